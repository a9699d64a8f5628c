import json
import shutil
import tarfile

import numpy as np
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import repair_dataset, write_dataset
from fm_core.data.manifest import load_manifest
from fm_core.data.shard_sidecar import sidecar_path
from fm_core.data.verify import validate_dataset, validate_manifest
from fm_core.errors import UserError
from fm_core.storage.store import Store
from tests.support.photographs import NpzFiles


@pytest.fixture(scope="module", params=["block", "image"])
def complete(request, tmp_path_factory):
    """A data set of each layout, not to be changed."""
    root = str(tmp_path_factory.mktemp(request.param))
    config = DataSection(root=root, block_bytes=6400, shard_blocks=3, layout=request.param)
    write_dataset(config)
    return config


@pytest.fixture
def config(complete, tmp_path):
    """A copy of it."""
    shutil.copytree(complete.root, tmp_path, dirs_exist_ok=True)
    return complete.model_copy(update={"root": str(tmp_path)})


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        content = content[:-512]
    path.write_bytes(content)
    if how == "remove":
        path.unlink()


@pytest.mark.parametrize("depth", ["quick", "default", "deep"])
def test_a_complete_data_set_has_no_problems(config, depth):
    result = validate_dataset(config, depth)
    assert result.problems == {}
    assert result.images == 1797
    assert json.loads(result.to_json())["depth"] == depth


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_named_and_repaired(config, tmp_path, how):
    before = load_manifest(config.root, config.name)
    path = tmp_path / "digits/train-000001.tar"
    content = path.read_bytes()
    damage(path, how)
    assert list(validate_dataset(config, "default").problems) == ["train-000001.tar"]
    assert bool(validate_dataset(config, "quick").problems) == (how != "flip")
    others = {p: p.stat().st_mtime_ns for p in path.parent.glob("*.tar") if p != path}
    assert repair_dataset(config) == before
    assert path.read_bytes() == content
    assert {p: p.stat().st_mtime_ns for p in others} == others


def test_a_damaged_manifest_is_made_again_from_the_commit_marks(config, tmp_path):
    path = tmp_path / "digits/manifest.json"
    content = path.read_text()
    path.write_text(content.replace('"levels": 17', '"levels": 16'))
    with pytest.raises(UserError, match="altered"):
        validate_dataset(config)
    damage(tmp_path / "digits/val-000000.tar", "flip")
    repair_dataset(config)
    assert path.read_text() == content
    assert validate_dataset(config).problems == {}


def test_a_manifest_of_a_newer_program_is_not_damage(config, tmp_path):
    path = tmp_path / "digits/manifest.json"
    newer = path.read_text().replace('"schema_version": 1', '"schema_version": 2')
    path.write_text(newer)
    with pytest.raises(UserError, match="schema version 2"):
        repair_dataset(config)
    assert path.read_text() == newer


def test_a_store_that_does_not_answer_is_not_damage(config, tmp_path, monkeypatch):
    def refuse(store, name):
        raise UserError("tried 5 times: timeout")

    monkeypatch.setattr(Store, "read_bytes", refuse)
    with pytest.raises(UserError, match="timeout"):
        repair_dataset(config)
    assert (tmp_path / "digits/manifest.json").exists()


def test_a_lost_commit_mark_is_detected_quickly(config):
    Store.at(config.root, config.name).remove(sidecar_path("train-000000.tar"))
    assert validate_dataset(config, "quick").problems == {"train-000000.tar": "its sidecar is missing"}


def rewritten(config, change):
    """The manifest after `change` of its first shard's bytes, with a hash that fits the change."""
    import hashlib

    store = Store.at(config.root, config.name)
    manifest = load_manifest(config.root, config.name)
    shard = manifest.shards[0]
    content = bytearray(store.read_bytes(shard.name))
    change(content, shard)
    store.write_bytes(shard.name, bytes(content))
    shard = shard.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    return store, manifest.model_copy(update={"shards": (shard, *manifest.shards[1:])})


@pytest.mark.parametrize(
    ("part", "value", "depth", "message"),
    [("x", 3, "deep", "has the wrong CRC"), ("y", 9, "default", "label histogram of train differs")],
)
def test_errors_that_hashes_do_not_show(tmp_path, part, value, depth, message):
    """As if the writer itself had been wrong."""
    config = DataSection(root=str(tmp_path), block_bytes=6400, shard_blocks=3)
    write_dataset(config)

    def change(content, shard):
        offset = shard.blocks[0].x_offset + 70 if part == "x" else shard.blocks[0].y_offset
        content[offset] = value

    store, manifest = rewritten(config, change)
    problems = validate_manifest(store, manifest, depth).problems
    assert len(problems) == 1
    assert message in next(iter(problems.values()))


def test_a_corrupted_header_is_not_the_end_of_the_archive(config):
    store, manifest = rewritten(
        config, lambda content, shard: content.__setitem__(_second_header(content), 1)
    )
    assert "header at byte" in validate_manifest(store, manifest, "default").problems["train-000000.tar"]


def _second_header(content):
    import io

    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return archive.getmembers()[1].offset + 150


def test_deep_compares_with_the_source_and_counts_equal_images(tmp_path):
    files = NpzFiles(rows=40)
    files.images["train_data_batch_1"][7] = files.images["train_data_batch_1"][3]
    folder = files.write_folder(tmp_path / "source")
    source = SourceSection(format="imagenet-npz", url=str(folder), image_size=8, allow_partial=True)
    config = DataSection(root=str(tmp_path), name="tiny", source=source, block_bytes=4096, shard_blocks=1)
    write_dataset(config)
    result = validate_dataset(config, "deep")
    assert result.problems == {}
    assert result.notes == ["1 images are pixel-identical to another one"]
    files.images["val_data"][0] ^= 1
    files.write_folder(folder)
    assert validate_dataset(config, "deep").problems == {"val-000000.tar": "the source gives other bytes now"}
    assert validate_dataset(config, "default").problems == {}
    for path in folder.iterdir():
        path.unlink()
    assert "not compared with the source" in validate_dataset(config, "deep").notes[-1]


def test_the_stage_names_what_is_wrong_and_repairs_it(tmp_path):
    from fm_core.config import RunConfig
    from fm_core.stages.validate import validate

    data = DataSection(root=str(tmp_path / "data"), block_bytes=6400, shard_blocks=3)
    config = RunConfig.model_validate({"run": {"root": str(tmp_path / "runs")}, "data": data.model_dump()})
    write_dataset(data)
    damage(tmp_path / "data/digits/val-000000.tar", "flip")
    with pytest.raises(UserError, match=r"val-000000\.tar: its SHA-256 .*fm validate --repair"):
        validate(config)
    seen = []
    result = validate(config, seen.append, depth="deep", repair=True)
    assert result.state == "verified"
    assert "1,797 images" in result.summary
    assert seen[-1].done == seen[-1].total == 1797
    for message in ("looking for damage", "repairing", "deep check"):
        done = [progress.done for progress in seen if progress.message == message]
        assert len(done) > 2, message
        assert done[-1] == 1797
        assert message == "repairing" or np.all(
            np.diff(done) >= 0
        )  # it starts again for the phase that writes
    validate(config, seen.append, depth="quick")
    assert (seen[-1].message, seen[-1].done) == ("quick check", 1797)
