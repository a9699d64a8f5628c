import errno
import hashlib
import io
import json
import tarfile
import time
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import check_source, write_dataset
from fm_core.data.manifest import load_manifest
from fm_core.data.shard_plan import make_plan
from fm_core.data.verify import validate_dataset
from fm_core.errors import UserError
from fm_core.storage.store import Store
from tests.support.photographs import NpzFiles


@pytest.fixture
def digits(tmp_path):
    return DataSection(root=str(tmp_path), block_bytes=6400, shard_blocks=3)


def contents(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_the_same_input_gives_the_same_bytes(digits, tmp_path):
    write_dataset(digits)
    write_dataset(digits.model_copy(update={"root": str(tmp_path / "again")}))
    assert contents(tmp_path / "digits") == contents(tmp_path / "again" / "digits")


def test_the_bytes_do_not_change_between_versions(digits):
    assert write_dataset(digits).shards[0].sha256 == (
        "001498e2853beb88e5672490d213bc8e82543f178beb6be8dfd0ce48eafa686e"
    )


def test_members_are_plain_ustar_without_times_or_owners(digits, tmp_path):
    write_dataset(digits)
    raw = (tmp_path / "digits/train-000000.tar").read_bytes()
    assert raw[257:263] == b"ustar\0"
    with tarfile.open(tmp_path / "digits/train-000000.tar") as archive:
        members = archive.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.type, tuple(m.pax_headers)) for m in members} == {
            (0, 0, 0, tarfile.REGTYPE, ())
        }
        assert [m.name for m in members[:3]] == [
            "000000-0000.x.npy",
            "000000-0000.y.npy",
            "000000-0000.crc.npy",
        ]
        array = np.load(io.BytesIO(archive.extractfile("000000-0001.x.npy").read()), allow_pickle=False)
    assert array.shape == (100, 1, 8, 8)


def test_progress_counts_images_up_to_the_plans_total(digits):
    seen = []
    write_dataset(digits, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == make_plan(digits).images == 1797


def test_a_complete_data_set_is_verified_and_returned(digits, tmp_path):
    first = write_dataset(digits)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").iterdir()}
    checked = []
    assert write_dataset(digits, checked.append) == first
    assert checked[-1] == 1797
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").iterdir()} == before


def test_a_complete_data_set_no_longer_needs_its_source(tmp_path):
    folder = NpzFiles().write_folder(tmp_path / "source")
    config = DataSection(
        root=str(tmp_path),
        name="tiny",
        source=SourceSection(format="imagenet-npz", url=str(folder), image_size=8, allow_partial=True),
    )
    first = write_dataset(config)
    for path in folder.iterdir():
        path.unlink()
    check_source(config)
    assert write_dataset(config) == first
    (tmp_path / "tiny/train-000000.tar").unlink()
    with pytest.raises(
        UserError, match=r"train-000000\.tar damaged, and cannot be rewritten: data\.source\.url"
    ):
        write_dataset(config)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_detected_and_written_again(digits, tmp_path, damage):
    first = write_dataset(digits)
    path = tmp_path / "digits/train-000002.tar"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "cut":
        path.write_bytes(content[:-512])
    else:
        path.unlink()
    assert list(validate_dataset(digits).problems) == ["train-000002.tar"]
    assert write_dataset(digits) == first
    assert path.read_bytes() == content
    assert validate_dataset(digits).problems == {}


def test_another_recipe_at_the_same_name_is_refused_with_the_difference(digits):
    write_dataset(digits)
    with pytest.raises(UserError, match="split_seed is 0 there, 1 here"):
        write_dataset(digits.model_copy(update={"split_seed": 1}))
    with pytest.raises(UserError, match="block_images is 100 there, 50 here"):
        check_source(digits.model_copy(update={"block_bytes": 3200}))


def test_another_recipe_is_refused_before_the_first_is_complete(digits, tmp_path):
    write_dataset(digits)
    (tmp_path / "digits/manifest.json").unlink()
    with pytest.raises(UserError, match="split_seed is 0 there, 1 here"):
        write_dataset(digits.model_copy(update={"split_seed": 1}))


def test_a_source_that_changed_half_way_is_refused(tmp_path):
    files = NpzFiles()
    folder = files.write_folder(tmp_path / "source")
    source = SourceSection(format="imagenet-npz", url=str(folder), image_size=8, allow_partial=True)
    config = DataSection(root=str(tmp_path), name="tiny", source=source)
    write_dataset(config)
    (tmp_path / "tiny/manifest.json").unlink()
    files.images["val_data"][0] ^= 1
    files.write_folder(folder)
    with pytest.raises(UserError, match="the source files are not those"):
        write_dataset(config)


def test_an_exception_while_writing_publishes_nothing(digits, tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(digits, lambda done: stop(done) if done >= 600 else None)
    with pytest.raises(UserError, match=r"manifest\.json is missing.*fm shard"):
        load_manifest(str(tmp_path), "digits")
    assert not list((tmp_path / "digits").glob(".*"))
    assert write_dataset(digits).splits["train"].images == 1297


def test_staged_files_appear_complete_or_not_at_all(tmp_path):
    for url in (str(tmp_path / "x"), "memory://staged-test"):
        store = Store.at(url)
        with pytest.raises(ZeroDivisionError), store.staged("a") as (_, file):
            file.write(bytes(1000 // (file.write(b"half") - 4)))
        assert store.sizes() == {}
        store.write_bytes("a", b"whole")
        assert store.read_bytes("a") == b"whole"


def write_slowly(config: DataSection, progress: Connection) -> None:
    def slowly(done: int) -> None:
        progress.send(done)
        time.sleep(0.05)

    write_dataset(config, slowly)


@pytest.mark.parametrize("shards", [1, 3])
def test_kill_in_the_middle_loses_at_most_the_current_shard(digits, tmp_path, shards):
    receiving, sending = Pipe(duplex=False)
    process = get_context("fork").Process(target=write_slowly, args=(digits, sending))
    process.start()
    while receiving.recv() < shards * 300:
        pass
    process.kill()
    process.join()
    folder = tmp_path / "digits"
    assert not (folder / "manifest.json").exists()
    mtimes = {path: path.stat().st_mtime_ns for path in folder.glob("train-*.tar")}
    assert len(mtimes) >= shards
    (folder / f".train-000004.tar.nohost.{process.pid}.0badcafe.partial").write_bytes(b"of another host")
    manifest = write_dataset(digits)
    assert all(path.stat().st_mtime_ns == time for path, time in list(mtimes.items())[:shards])
    assert (
        manifest.version == write_dataset(digits.model_copy(update={"root": str(tmp_path / "fresh")})).version
    )
    assert validate_dataset(digits).problems == {}


def test_a_lack_of_space_is_reported_before_anything_is_written(digits, monkeypatch):
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    with pytest.raises(UserError, match=r"data\.root: .* free, the shards need"):
        write_dataset(digits)


def test_a_root_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Not a directory"):
        write_dataset(DataSection(root=str(tmp_path / "file")))


def test_a_full_disk_is_one_line_and_leaves_nothing(digits, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fm_core.storage.atomic_files.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_dataset(digits)
    assert not [path for path in (tmp_path / "digits").rglob("*") if path.is_file()]


def test_a_manifest_of_a_newer_schema_is_refused(digits, tmp_path):
    write_dataset(digits)
    path = tmp_path / "digits/manifest.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"schema_version": 2}))
    with pytest.raises(UserError, match="schema version 2; this program reads version 1"):
        load_manifest(str(tmp_path), "digits")


def test_an_altered_manifest_is_refused(digits, tmp_path):
    write_dataset(digits)
    path = tmp_path / "digits/manifest.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"levels": 256}))
    with pytest.raises(UserError, match="altered"):
        load_manifest(str(tmp_path), "digits")


def test_the_version_depends_only_on_the_content(digits, tmp_path):
    manifest = write_dataset(digits)
    other = manifest.model_copy(update={"name": "other", "inputs": ()})
    assert other.version == manifest.version
    assert manifest.model_copy(update={"label_order": "other"}).version != manifest.version
