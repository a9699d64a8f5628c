"""The first images of a split are a representative sample, in new data sets and in existing ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from fm_core.data.dataset_builder import read_complete, write_dataset
from fm_core.data.manifest import Manifest
from fm_core.data.reader import ImageReader, fair_order, has_fair_order
from fm_core.data.verify import validate_dataset
from fm_core.errors import UserError
from fm_core.evaluation.reference import subset_indices
from fm_core.training.validation_loss import SequentialSampler
from tests.support.source_cases import Case, parquet

CLASSES = "abcdefghij"
SPLITS = {f"{s}/{c}/{n}.png": n for s in ("train", "val") for c in CLASSES for n in range(12)}


def first_labels(config, manifest, split, count=12):
    with ImageReader(config.root, manifest, split) as reader:
        return reader.read(np.arange(count))[1].tolist()


@pytest.fixture
def sorted_by_class(tmp_path):
    """A data set with 12 images of each of ten classes in both splits."""
    config = Case("sorted", SPLITS).config(tmp_path)
    return config, write_dataset(config)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_prefix_of_a_split_in_class_folders_has_several_classes(sorted_by_class, split):
    config, manifest = sorted_by_class
    assert len(set(first_labels(config, manifest, split))) > 4
    assert has_fair_order(manifest, split)
    assert fair_order(manifest, split).tolist() == list(range(120))


def test_so_has_that_of_a_random_split_of_one_tree(tmp_path):
    files = {f"{c}/{n}.png": n for c in CLASSES for n in range(24)}
    config = Case("one tree", files, data={"validation_images": 120}).config(tmp_path)
    manifest = write_dataset(config)
    assert len(set(first_labels(config, manifest, "val"))) > 4


def test_so_have_rows_of_parquet_that_are_sorted_by_class(tmp_path):
    rows = [(n, c) for c in range(10) for n in range(12)]
    file = parquet([n for n, _ in rows], [c for _, c in rows])
    files = {"train-0.parquet": file, "validation-0.parquet": file}
    config = Case("rows", files, source={"format": "parquet"}).config(tmp_path)
    manifest = write_dataset(config)
    for split in ("train", "val"):
        assert len(set(first_labels(config, manifest, split))) > 4


def as_written_by_an_earlier_version(config, manifest: Manifest) -> Manifest:
    """The manifest without what this version added to it, in place of the new one."""
    added = ("recipe_version", "background")
    recipe = {key: value for key, value in manifest.recipe.items() if key not in added}
    old = manifest.model_copy(update={"recipe": recipe | {"validation_images": 2}, "interpretation": None})
    text = json.loads(old.to_json())
    del text["interpretation"]
    folder = f"{config.root}/{config.name}"
    with Path(folder, "manifest.json").open("w") as file:
        json.dump(text, file)
    return old


def test_data_sets_of_earlier_versions_are_read_and_verified_in_a_fair_order(sorted_by_class):
    config, manifest = sorted_by_class
    old = as_written_by_an_earlier_version(config, manifest)
    read = read_complete(config)
    assert read is not None
    assert read.version == old.version
    assert write_dataset(config).version == old.version
    assert has_fair_order(old, "train")  # these were shuffled before, too
    assert not has_fair_order(old, "val")
    order = fair_order(old, "val")
    assert sorted(order.tolist()) == list(range(120))
    assert len(set((order[:12] // 12).tolist())) > 4
    assert SequentialSampler(order).ids(118, 4).tolist() == [*order[118:], *order[:2]]
    deep = validate_dataset(config, "deep")
    assert any("not compared with the source: an earlier version" in note for note in deep.notes)


def test_damaged_shards_of_earlier_versions_are_not_replaced_by_others(sorted_by_class, tmp_path):
    config, manifest = sorted_by_class
    as_written_by_an_earlier_version(config, manifest)
    shard = tmp_path / "sets/set/train-000000.tar"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    with pytest.raises(UserError, match=r"train-000000\.tar damaged, and written by an earlier version"):
        write_dataset(config)
    assert (tmp_path / "sets/set/commits/train-000000.json").exists()


@pytest.mark.parametrize(
    ("source", "partial", "fair"),
    [
        ("imagenet-npz", False, True),
        ("imagenet-npz", True, False),
        ("digits", None, True),
        ("parquet", None, False),
    ],
)
def test_published_orders_are_fair_as_far_as_the_set_is_complete(sorted_by_class, source, partial, fair):
    _, manifest = sorted_by_class
    recipe = {"source": source} | ({} if partial is None else {"allow_partial": partial})
    old = manifest.model_copy(update={"recipe": recipe, "interpretation": None})
    assert has_fair_order(old, "val") == fair


@pytest.mark.parametrize(("count", "maximum"), [(50_000, 10_000), (200, 40), (1000, 100)])
def test_a_subset_has_the_classes_of_the_set_in_whatever_cycle_they_come(count, maximum):
    indices = subset_indices(count, maximum)
    assert len(set(indices.tolist())) == maximum
    assert indices.tolist() == sorted(indices.tolist())
    for cycle in (2, 5, 10):
        shares = np.bincount(indices.numpy() % cycle, minlength=cycle) / maximum
        assert (abs(shares - 1 / cycle) < 0.15).all()


def test_a_plan_of_which_nothing_was_written_binds_nothing(tmp_path):
    config = Case("plan", {f"a/{n}.png": n for n in range(5)} | {"a/9.png": b"x"}).config(tmp_path)
    with pytest.raises(UserError, match="max_quarantined"):
        write_dataset(config)
    for sidecar in (tmp_path / "sets/set/commits").glob("*.json"):
        sidecar.unlink()
    other = config.source.model_copy(update={"background": "black"})
    manifest = write_dataset(config.model_copy(update={"source": other, "max_quarantined": 0.5}))
    assert manifest.recipe["background"] == "black"
