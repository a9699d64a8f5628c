"""Index of a split's shards: open file descriptors, and the offset, label and CRC of each image."""

import os
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fm_core.data.cache import NodeCache
from fm_core.data.manifest import Shard, repair_command
from fm_core.errors import UserError
from fm_core.run.resource_limits import open_file_limit
from fm_core.storage.store import Store

SHARE_OF_FILES = 2
"""Fraction of the open-file limit for shards; sockets and checkpoints need the rest."""
CHECKED_COPIES = 4
"""Number of open copies that are checked for eviction each time a shard is opened."""

_indexes: "weakref.WeakSet[ShardIndex]" = weakref.WeakSet()
"""All indexes of this process, which share one budget of open files."""


def open_shards_each() -> int:
    """Number of shards that each index of this process may keep open, at least 1."""
    return max(1, open_file_limit() // SHARE_OF_FILES // max(1, len(_indexes)))


class ShardTable:
    """Offset, label and CRC of each image of a split.

    Takes 12 bytes per image, 15 MB for ImageNet (28 bytes in layout image).
    """

    def __init__(self, shards: Sequence[Shard], image_bytes: int) -> None:
        blocks = [block for shard in shards for block in shard.blocks]
        counts = np.array([block.images for block in blocks], np.int64)
        self._image_bytes = image_bytes
        self._first = np.cumsum(counts) - counts
        self._offset = np.array([block.x_offset for block in blocks], np.int64)
        self._shard_first = np.array([shard.first_id for shard in shards], np.int64)
        total = sum(shard.images for shard in shards)
        self.png_places: NDArray[np.int64] | None = None
        """Layout image: offset and size of each PNG of the shards opened so far; int64 [images, 2]."""
        if not blocks:
            self.png_places = np.zeros((total, 2), np.int64)
        self.labels = np.full(total, -1, np.int64)
        """Label of each image of the shards opened so far, -1 without labels; int64 [images]."""
        self.crcs = np.zeros(total, np.uint32)
        """CRC-32 of each image of the shards opened so far; uint32 [images]."""

    def shards_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shard number of each id; int64 [n]."""
        return np.searchsorted(self._shard_first, ids, "right") - 1

    def offsets_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Layout block: offset of the pixels of each id in its shard; int64 [n]."""
        block = np.searchsorted(self._first, ids, "right") - 1
        return self._offset[block] + (ids - self._first[block]) * self._image_bytes


class ShardIndex:
    """Open file descriptors of shards; the least recently used is closed first.

    All indexes of a process share its limit of open files. The cost of opening a shard does not depend on the
    number of shards.
    """

    def __init__(self, store: Store, shards: Sequence[Shard], cache: NodeCache, table: ShardTable) -> None:
        self._store, self._shards, self._cache, self._table = store, shards, cache, table
        self._files: dict[int, int] = {}
        """Least recently used first."""
        self._loaded: set[int] = set()
        self._prefetched: set[int] = set()
        self._unchecked: list[int] = []
        _indexes.add(self)

    @property
    def limit(self) -> int:
        """Largest number of different shards in one call of `files`."""
        return open_shards_each()

    def files(self, shards: NDArray[np.int64]) -> list[int]:
        """File descriptors for these shard numbers; UserError if a shard is missing or damaged."""
        files = self._files
        needed: list[int] = np.unique(shards).tolist()
        missing = [number for number in needed if number not in files]
        if missing:
            _indexes.add(self)
            for number in needed:
                if number in files:
                    files[number] = files.pop(number)
            keep = set(needed)
            for _ in range(min(len(files), len(files) + len(missing) - self.limit)):
                oldest = next(iter(files))
                if oldest in keep:
                    break
                os.close(files.pop(oldest))
            for number in missing:
                self._close_evicted(keep)
                files[number] = self._open(number)
                self._prefetched.discard(number)
        return [files[number] for number in shards.tolist()]

    def refetch(self, numbers: Sequence[int]) -> None:
        """Close shards and discard their copies, so that they are downloaded again."""
        for number in numbers:
            os.close(self._files.pop(number))
            self._loaded.discard(number)
            self._cache.discard(self._store, self._shards[number])

    @property
    def remote(self) -> bool:
        """Whether shards are copied to this node."""
        return self._store.local is None

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to copy shards that are neither open nor already prefetched."""
        numbers = [
            number for number in numbers if number not in self._files and number not in self._prefetched
        ]
        self._prefetched.update(numbers)
        self._cache.prefetch(self._store, [self._shards[number] for number in numbers])

    def where(self, number: int) -> str:
        """URL of a shard, for messages."""
        return f"{self._store.url}/{self._shards[number].name}"

    def close(self) -> None:
        """Close all files."""
        _indexes.discard(self)
        while self._files:
            os.close(self._files.popitem()[1])

    def _close_evicted(self, keep: set[int]) -> None:
        """Close files whose evicted copy still occupies space; checks a few files per call."""
        if not self.remote:
            return
        for _ in range(CHECKED_COPIES):
            if not self._unchecked:
                self._unchecked = list(self._files)[::-1]
            if not self._unchecked:
                return
            number = self._unchecked.pop()
            if number in self._files and number not in keep and os.fstat(self._files[number]).st_nlink == 0:
                os.close(self._files.pop(number))

    def _open(self, number: int) -> int:
        """Open a shard and read its index; a truncated copy is downloaded once more."""
        for _ in range(2):
            file = self._cache.open(self._store, self._shards[number])
            try:
                if number not in self._loaded:
                    self._load(number, file)
            except EOFError:
                os.close(file)
                self._cache.discard(self._store, self._shards[number])
            except BaseException:
                os.close(file)
                raise
            else:
                return file
        repair = repair_command(self._shards[number].name)
        raise UserError(f"{self.where(number)}: shorter than the manifest says; run {repair}")

    def _load(self, number: int, file: int) -> None:
        """Read the labels and the CRCs of a shard; EOFError if it ends before them."""
        shard = self._shards[number]
        if shard.index_offset is not None:
            self._load_index(file, shard, shard.index_offset)
        row = shard.first_id
        for block in shard.blocks:
            rows = slice(row, row + block.images)
            if block.y_offset is not None:
                _fill(file, self._table.labels[rows], block.y_offset)
            _fill(file, self._table.crcs[rows], block.crc_offset)
            row += block.images
        self._loaded.add(number)

    def _load_index(self, file: int, shard: Shard, offset: int) -> None:
        """Layout image: read the offsets of the PNGs, their labels and CRCs."""
        index = np.empty((shard.images, 4), np.int64)
        _fill(file, index, offset)
        rows = slice(shard.first_id, shard.first_id + shard.images)
        assert self._table.png_places is not None
        self._table.png_places[rows] = index[:, :2]
        self._table.labels[rows] = index[:, 2]
        self._table.crcs[rows] = index[:, 3].astype(np.uint32)


def _fill(file: int, array: NDArray[np.generic], offset: int) -> None:
    target = array.data.cast("B")
    if os.preadv(file, [target], offset) != len(target):
        raise EOFError(offset)
