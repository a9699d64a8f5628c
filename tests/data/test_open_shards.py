"""Open shards: one budget of descriptors for all readers of a process, at a cost that does not grow."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fm_core.data import shard_index
from fm_core.data.cache import NodeCache
from fm_core.data.shard_index import ShardIndex
from fm_core.storage.store import Store


class Files:
    """A store whose shards are one file, with counts of what was done to them."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, local: bool = True) -> None:
        self.path, self.opened, self.checked, self.most = path, 0, 0, 0
        self.open_now: set[int] = set()
        self.local = path if local else None
        path.joinpath("shard").touch()
        stock_close, stock_stat = os.close, os.fstat
        monkeypatch.setattr(shard_index, "open_file_limit", lambda: limit)
        monkeypatch.setattr(ShardIndex, "_load", lambda *_: None)

        def close(file: int) -> None:
            self.open_now.discard(file)
            stock_close(file)

        def stat(file: int) -> os.stat_result:
            self.checked += 1
            return stock_stat(file)

        monkeypatch.setattr(shard_index.os, "close", close)
        monkeypatch.setattr(shard_index.os, "fstat", stat)

    def open(self, store: object, shard: object) -> int:
        file = os.open(self.path / "shard", os.O_RDONLY)
        self.opened += 1
        self.open_now.add(file)
        self.most = max(self.most, len(self.open_now))
        return file

    def index(self, shards: int) -> ShardIndex:
        store: Any = SimpleNamespace(local=self.local, url="x")
        cache: Any = self
        return ShardIndex(store, [SimpleNamespace(name="shard")] * shards, cache, SimpleNamespace())


def numbers(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int64)


def test_all_readers_of_a_process_stay_within_half_of_its_files(tmp_path: Path, monkeypatch):
    files = Files(tmp_path, monkeypatch, limit=80)
    train, validation = files.index(500), files.index(500)
    assert train.limit == 20
    for first in range(0, 480, 20):
        train.files(numbers(first, 20))
        validation.files(numbers(first, 20))
    assert files.most <= 40
    validation.close()
    assert train.limit == 40
    train.close()
    assert files.open_now == set()


def test_the_least_recently_used_shard_is_closed_and_none_that_is_needed(tmp_path: Path, monkeypatch):
    files = Files(tmp_path, monkeypatch, limit=8)
    index = files.index(100)
    first = index.files(numbers(0, 4))
    assert index.files(np.array([0, 1, 50]))[:2] == first[:2]  # 2 or 3 was closed
    assert index.files(np.array([0, 1])) == first[:2]
    assert files.opened == 5
    assert len(index.files(numbers(60, 4))) == 4
    index.close()


@pytest.mark.parametrize("shards", [100, 5_000])
def test_opening_a_shard_of_a_store_costs_the_same_however_many_are_open(
    tmp_path: Path, monkeypatch, shards: int
):
    files = Files(tmp_path, monkeypatch, limit=20_000, local=False)
    index = files.index(shards)
    for number in range(shards):
        index.files(numbers(number, 1))
    assert files.opened == shards
    assert files.checked <= shard_index.CHECKED_COPIES * shards
    index.close()


def test_copies_that_were_evicted_are_closed_in_the_end(tmp_path: Path, monkeypatch):
    files = Files(tmp_path, monkeypatch, limit=20_000, local=False)
    index = files.index(200)
    index.files(numbers(0, 50))
    (tmp_path / "shard").unlink()
    (tmp_path / "shard").touch()
    for number in range(50, 100):
        index.files(numbers(number, 1))
    assert len(files.open_now) == 50
    assert all(os.fstat(file).st_nlink for file in files.open_now)
    index.close()


def test_too_many_open_files_are_not_blamed_on_the_shard(tmp_path: Path, monkeypatch):
    def exhausted(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    shard: Any = SimpleNamespace(name="shard")
    store = Store.at(str(tmp_path))
    monkeypatch.setattr("fm_core.data.cache.os.open", exhausted)
    with pytest.raises(OSError, match="Too many open files") as caught:
        NodeCache(str(tmp_path / "cache")).open(store, shard)
    assert "repair" not in str(caught.value)
