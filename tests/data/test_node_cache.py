import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fm_core.config.data import DataSection
from fm_core.data.batches import Batches
from fm_core.data.cache import NodeCache
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.reader import ImageReader
from fm_core.data.sampler import GlobalShuffleSampler
from fm_core.errors import UserError
from fm_core.storage.store import Store
from tests.support.operator import until


@pytest.fixture
def remote(tmp_path):
    root = f"memory://{tmp_path.name}"
    manifest = write_dataset(DataSection(root=root, block_bytes=6400, shard_blocks=2))
    yield root, manifest
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def copies(folder):
    return {path.stem for path in folder.glob("*.tar")}


def test_the_cache_stays_under_its_limit_and_drops_what_was_longest_unused(tmp_path, remote):
    root, manifest = remote
    shards = manifest.split_shards("train")
    cache = NodeCache(str(tmp_path), limit_bytes=2 * shards[0].bytes)
    store = Store.at(root, "digits")
    for number, (shard, second) in enumerate(((0, 100), (1, 200), (0, 300), (2, 400))):
        file = cache.open(store, shards[shard])
        os.utime(file, (second + number, second + number))
        os.close(file)
    assert copies(tmp_path) == {shards[0].sha256, shards[2].sha256}


def test_reading_through_a_cache_smaller_than_the_data_is_right(tmp_path, remote):
    root, manifest = remote
    limit = manifest.shards[0].bytes
    with (
        ImageReader(root, manifest, "train", NodeCache(str(tmp_path / "a"), limit)) as small,
        ImageReader(root, manifest, "train", NodeCache(str(tmp_path / "b"))) as full,
    ):
        ids = GlobalShuffleSampler(0, len(full)).ids(0, 400)
        assert np.array_equal(small.read(ids)[0], full.read(ids)[0])
    assert len(copies(tmp_path / "a")) == 1


def test_a_corrupted_copy_is_fetched_again(tmp_path, remote):
    root, manifest = remote
    with ImageReader(root, manifest, "train", NodeCache(str(tmp_path))) as reader:
        before = reader.read(np.arange(50))[0]
        path = tmp_path / f"{manifest.shards[0].sha256}.tar"
        content = path.read_bytes()
        offset = manifest.shards[0].blocks[0].x_offset
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([content[offset] ^ 1]))
        assert np.array_equal(reader.read(np.arange(50))[0], before)
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 700, -1])
def test_a_copy_that_a_power_loss_cut_is_fetched_again(tmp_path, remote, size):
    """fm validate --repair would not fix it, as it reads only the store."""
    root, manifest = remote
    shard = manifest.shards[0]
    with ImageReader(root, manifest, "train", NodeCache(str(tmp_path))) as reader:
        before = reader.read(np.arange(50))
    path = tmp_path / f"{shard.sha256}.tar"
    os.truncate(path, size % shard.bytes)
    with ImageReader(root, manifest, "train", NodeCache(str(tmp_path))) as reader:
        again = reader.read(np.arange(50))
    assert all(map(np.array_equal, before, again))
    assert path.stat().st_size == shard.bytes


@pytest.mark.parametrize("times", [1, 2])
def test_a_copy_cut_once_it_is_open_is_fetched_once_more(tmp_path, remote, monkeypatch, times):
    root, manifest = remote
    original_open, truncated = NodeCache.open, []

    def cutting(self, store, shard):
        file = original_open(self, store, shard)
        if len(truncated) < times:
            truncated.append(os.truncate(tmp_path / f"{shard.sha256}.tar", 700))
        return file

    monkeypatch.setattr(NodeCache, "open", cutting)
    with ImageReader(root, manifest, "train", NodeCache(str(tmp_path))) as reader:
        if times == 1:
            assert reader.read(np.arange(50))[1].min() >= 0
        else:
            with pytest.raises(UserError, match=r"train-000000\.tar: shorter than .*fm validate --repair"):
                reader.read(np.arange(50))


def test_a_copy_is_on_the_disk_before_it_has_its_name(tmp_path, remote, monkeypatch):
    root, manifest = remote
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
    )
    os.close(NodeCache(str(tmp_path)).open(Store.at(root, "digits"), manifest.shards[0]))
    assert f"{tmp_path}/{manifest.shards[0].sha256}.partial" in synced


def test_prefetch_copies_shards_ahead_of_the_order(tmp_path, remote):
    root, manifest = remote
    cache = NodeCache(str(tmp_path))
    with ImageReader(root, manifest, "train", cache) as reader:
        with Batches(
            reader, GlobalShuffleSampler(0, len(reader)), position=0, global_batch=1, ahead=1, look_ahead=60
        ) as it:
            next(it)
            every = len(manifest.split_shards("train"))
            until(lambda: len(copies(tmp_path)) == every, "the copies of all shards")
        cache.close()


def test_a_store_that_loses_a_shard_is_named(tmp_path, remote):
    root, manifest = remote
    Store.at(root, "digits").remove("train-000001.tar")
    with (
        ImageReader(root, manifest, "train", NodeCache(str(tmp_path))) as reader,
        pytest.raises(UserError, match=r"train-000001\.tar: missing; run fm validate --repair"),
    ):
        reader.read(np.array([200]))


def test_threads_share_one_download(tmp_path, remote, monkeypatch):
    root, manifest = remote
    store = Store.at(root, "digits")
    fetched = []
    monkeypatch.setattr(
        Store,
        "fetch",
        lambda self, name, target: (fetched.append(name), target.write_bytes(self.read_bytes(name))),
    )
    threads = [
        threading.Thread(target=lambda: os.close(NodeCache(str(tmp_path)).open(store, manifest.shards[0])))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["train-000000.tar"]


def open_in_threads(folder, limit, store, shards):
    """Simulate a process with its own cache and handles; return its error."""
    failed = []

    def open_one(shard):
        try:
            os.close(NodeCache(folder, limit).open(store, shard))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=open_one, args=(shard,)) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return failed


def test_downloads_at_one_time_keep_the_limit_together(tmp_path, remote, monkeypatch):
    root, manifest = remote
    store, shards = Store.at(root, "digits"), manifest.split_shards("train")
    limit = 2 * shards[0].bytes
    most = []

    def slow(self, name, target):
        target.write_bytes(self.read_bytes(name))
        time.sleep(0.05)
        files = [*tmp_path.glob("*.tar"), *tmp_path.glob("*.partial")]
        with suppress(FileNotFoundError):  # another thread renames
            most.append(sum(path.stat().st_size for path in files))

    monkeypatch.setattr(Store, "fetch", slow)
    assert open_in_threads(str(tmp_path), limit, store, shards * 2) == []
    assert len(most) >= len(shards) / 2
    assert max(most) <= limit
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.reserved")]


def test_what_a_killed_download_left_is_removed_and_takes_no_space(tmp_path, remote):
    root, manifest = remote
    shards = manifest.split_shards("train")
    for shard in shards[:2]:  # the second one is downloaded here, the first one is not downloaded at all
        with (tmp_path / f"{shard.sha256}.reserved").open("wb") as file:
            file.truncate(shard.bytes)
        (tmp_path / f"{shard.sha256}.partial").write_bytes(b"half")
    failed = open_in_threads(str(tmp_path), shards[1].bytes, Store.at(root, "digits"), shards[1:2])
    assert failed == []
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.reserved")]
    assert copies(tmp_path) == {shards[1].sha256}


def test_the_manifest_is_fetched_once_per_node_and_job(tmp_path, remote, monkeypatch):
    root, manifest = remote
    fetched = []
    stock = Store.read_bytes
    monkeypatch.setattr(Store, "read_bytes", lambda self, name: fetched.append(name) or stock(self, name))
    ranks = [
        threading.Thread(target=NodeCache(str(tmp_path)).manifest, args=(root, "digits", "job-a"))
        for _ in range(8)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert NodeCache(str(tmp_path)).manifest(root, "digits", "job-a") == manifest
    assert fetched == ["manifest.json"]
    assert NodeCache(str(tmp_path)).manifest(root, "digits", "job-b") == manifest
    assert fetched == ["manifest.json", "manifest.json"]


def test_a_limit_below_one_shard_is_one_line(tmp_path, remote):
    root, manifest = remote
    with pytest.raises(UserError, match=r"data\.cache_bytes: 700 bytes do not hold one shard of \d+ bytes"):
        NodeCache(str(tmp_path), 700).open(Store.at(root, "digits"), manifest.shards[0])


READ = """
import sys, numpy as np, fsspec
from fm_core.data.cache import NodeCache
from fm_core.data.manifest import load_manifest
from fm_core.data.reader import ImageReader
root, folder = sys.argv[1:]
class Slow(type(fsspec.filesystem("file"))):
    protocol = "slow"
fsspec.register_implementation("slow", Slow)
manifest = load_manifest(root, "digits")
limit = 2 * manifest.shards[0].bytes
with ImageReader(root, manifest, "train", NodeCache(folder, limit)) as reader:
    for _ in range(2):
        images, labels = reader.read(np.random.default_rng().permutation(len(reader)))
        assert int(labels.sum()) == sum(c * n for c, n in enumerate(manifest.splits["train"].class_histogram))
"""


@pytest.fixture
def reading_processes(tmp_path) -> list[subprocess.Popen[str]]:
    """Three processes that read a remote data set through one cache of two shards."""
    write_dataset(DataSection(root=str(tmp_path / "data"), block_bytes=6400, shard_blocks=2))
    command = [sys.executable, "-c", READ, f"slow://{tmp_path}/data", str(tmp_path / "cache")]
    return [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]


def test_processes_share_and_evict_without_disturbing_one_another(tmp_path, reading_processes):
    for process in reading_processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
