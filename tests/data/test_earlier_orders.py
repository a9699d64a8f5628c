"""ImageNet in class folders as earlier versions ordered it: read, verified, repaired and continued."""

import json

import numpy as np
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import repair_dataset, write_dataset
from fm_core.data.manifest import load_manifest
from fm_core.data.reader import has_fair_order
from fm_core.data.shard_plan import make_plan, record_plan
from fm_core.data.verify import validate_dataset
from fm_core.storage.store import Store
from tests.support.photographs import write_tree
from tests.support.source_cases import read_split, tree

FILES = {
    f"{split}/n0000000{c}/{n}.png": 100 * (split == "val") + 20 * c + n
    for split in ("train", "val")
    for c in (1, 2)
    for n in range(10)
}


@pytest.fixture
def config(tmp_path):
    source = {"format": "imagenet-folder", "image_size": 8, "allow_partial": True}
    url = str(write_tree(tmp_path / "source", tree(FILES)))
    section = SourceSection.model_validate({**source, "url": url})
    return DataSection(root=str(tmp_path / "sets"), name="set", source=section, block_bytes=1024)


def as_earlier_versions_wrote_it(config, tmp_path):
    """Neither manifest nor plan names an order; validation images are in the order of their paths."""
    store = Store.at(config.root, config.name)
    record_plan(store, make_plan(config))
    folder = tmp_path / "sets/set"
    (folder / "commits").mkdir()
    (folder / "commits/begun").touch()
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(
        json.dumps({key: plan[key] for key in plan.keys() - {"order", "source_url"}})
    )
    manifest = write_dataset(config)
    (folder / "commits/begun").unlink()
    record = json.loads(manifest.to_json())
    (folder / "manifest.json").write_text(
        json.dumps({key: record[key] for key in record.keys() - {"interpretation", "source_url"}})
    )
    return folder, load_manifest(config.root, config.name)


def numbers(folder, split):
    return [int(image[0, 0, 0]) for image in read_split(folder, split)[0]]


def test_a_new_data_set_is_shuffled(config, tmp_path):
    manifest = write_dataset(config)
    assert numbers(tmp_path / "sets/set", "val") != sorted(numbers(tmp_path / "sets/set", "val"))
    assert has_fair_order(manifest, "val")


@pytest.mark.parametrize("damaged", ["train-000000.tar", "val-000000.tar"])
def test_an_earlier_one_is_intact_and_repaired_in_its_own_order(config, tmp_path, damaged):
    folder, before = as_earlier_versions_wrote_it(config, tmp_path)
    assert numbers(folder, "val") == sorted(numbers(folder, "val"))
    assert not has_fair_order(before, "val")
    validation = validate_dataset(config, "deep")
    assert validation.problems == {}
    assert not any("not compared" in note for note in validation.notes)
    content = bytearray((folder / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / damaged).write_bytes(content)
    assert repair_dataset(config) == before
    assert validate_dataset(config, "deep").problems == {}


def test_an_earlier_one_whose_manifest_is_lost_is_made_complete(config, tmp_path):
    folder, before = as_earlier_versions_wrote_it(config, tmp_path)
    (folder / "manifest.json").unlink()
    (folder / "val-000000.tar").unlink()
    after = repair_dataset(config)
    assert after.version == before.version
    assert after.interpretation is not None
    assert not after.interpretation.fair_order
    assert np.array_equal(numbers(folder, "val"), sorted(numbers(folder, "val")))
