"""Images by id, straight from the shards."""

import os
import zlib
from math import prod
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from fm_core.data.cache import NodeCache
from fm_core.data.manifest import Manifest, Shard
from fm_core.data.store import Store
from fm_core.errors import UserError

OPEN_SHARDS = 256


class ImageReader:
    """Reads images of one split with one positional read each; shards are opened when first needed.

    A remote shard is first copied to the node's cache. Not for use by several threads at once.
    """

    def __init__(self, root_url: str, manifest: Manifest, split: str, cache: NodeCache | None = None) -> None:
        self.manifest = manifest
        self.split = split
        self.image_shape = manifest.image_shape
        self._store = Store.at(root_url, manifest.name)
        self._cache = cache or NodeCache()
        self._shards = manifest.split_shards(split)
        self._table = _BlockTable(self._shards, prod(manifest.image_shape))
        self._open: dict[int, _OpenShard] = {}

    def __len__(self) -> int:
        """Images in the split."""
        return self.manifest.splits[self.split].images

    def read(self, ids: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 [n, C, H, W] and labels int64 [n] (-1 without labels) of ids [n].

        Raises IndexError for an id that is not there; UserError, with the shard's name, for a shard
        that is missing, too short, or damaged.
        """
        images = torch.empty((len(ids), *self.image_shape), dtype=torch.uint8)
        labels = torch.empty(len(ids), dtype=torch.int64)
        self.read_into(ids, images, labels)
        return images, labels

    def read_into(self, ids: NDArray[np.int64], images: torch.Tensor, labels: torch.Tensor) -> None:
        """Like read, into tensors on the CPU that are there already."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"ids {ids.min()} .. {ids.max()} are not in 0 .. {len(self) - 1}")
        shards, rows, offsets = self._table.locate(ids)
        size = self._table.image_bytes
        pixels: NDArray[np.uint8] = images.numpy()
        classes: NDArray[np.int64] = labels.numpy()
        target = pixels.data.cast("B")
        for index, (shard, row, offset) in enumerate(
            zip(shards.tolist(), rows.tolist(), offsets.tolist(), strict=True)
        ):
            opened = self._open.get(shard) or self._open_shard(shard)
            view = target[index * size : (index + 1) * size]
            classes[index] = opened.read(row, offset, view)

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open_shard(self, index: int) -> "_OpenShard":
        if len(self._open) >= OPEN_SHARDS:
            self._open.pop(next(iter(self._open))).close()
        shard = self._shards[index]
        path = self._cache.local_path(self._store, shard)
        opened = self._open[index] = _OpenShard(path, shard, f"{self._store.url}/{shard.name}")
        return opened


class _BlockTable:
    """Where each image of a split is."""

    def __init__(self, shards: tuple[Shard, ...], image_bytes: int) -> None:
        self.image_bytes = image_bytes
        blocks = [(number, shard, block) for number, shard in enumerate(shards) for block in shard.blocks]
        counts = np.array([block.images for _, _, block in blocks], np.int64)
        self._first = np.cumsum(counts) - counts
        self._shard = np.array([number for number, _, _ in blocks], np.int64)
        self._shard_first = np.array([shard.first_id for _, shard, _ in blocks], np.int64)
        self._offset = np.array([block.x_offset for _, _, block in blocks], np.int64)

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Shard index, row in the shard and byte offset of each id; int64 [n] each."""
        block = np.searchsorted(self._first, ids, "right") - 1
        rows = ids - self._shard_first[block]
        offsets = self._offset[block] + (ids - self._first[block]) * self.image_bytes
        return self._shard[block], rows, offsets


class _OpenShard:
    """A shard's file, its labels and its CRCs."""

    def __init__(self, path: Path, shard: Shard, where: str) -> None:
        self._where = where
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}; run fm shard to write it again") from None
        self._labels = np.full(shard.images, -1, np.int64)
        self._crcs = np.empty(shard.images, np.uint32)
        row = 0
        for block in shard.blocks:
            rows = slice(row, row + block.images)
            if block.y_offset is not None:
                self._fill(self._labels[rows], block.y_offset)
            self._fill(self._crcs[rows], block.crc_offset)
            row += block.images

    def read(self, row: int, offset: int, target: memoryview) -> int:
        """Read an image into `target` and check its CRC; its label."""
        self._read(offset, target)
        if zlib.crc32(target) != self._crcs[row]:
            raise UserError(f"{self._where}: image {row} is damaged; run fm shard to write the shard again")
        return int(self._labels[row])

    def close(self) -> None:
        os.close(self._file)

    def _fill(self, array: NDArray[np.generic], offset: int) -> None:
        self._read(offset, array.data.cast("B"))

    def _read(self, offset: int, target: memoryview) -> None:
        if os.preadv(self._file, [target], offset) != len(target):
            raise UserError(f"{self._where}: shorter than the manifest says; run fm shard to write it again")
