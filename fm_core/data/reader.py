"""Image reader: random access by id, with each image checked against its CRC."""

import os
from collections.abc import Sequence
from math import prod
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from fm_core.data.cache import NodeCache
from fm_core.data.manifest import Manifest, repair_command
from fm_core.data.shard_format import decode_png
from fm_core.data.shard_index import ShardIndex, ShardTable
from fm_core.data.sources.splits import permutation
from fm_core.errors import UserError
from fm_core.storage.hashing import crc32
from fm_core.storage.store import Store

Ids = NDArray[np.int64]
CHUNK_IMAGES = 256
PUBLISHED_IN_RANDOM_ORDER = {"digits", "imagenet-npz", "imagenet-png", "imagenet-tar", "cifar10"}
"""Sources whose images were shuffled before publication, provided the set is complete."""
SHUFFLED_FOR_TRAINING = {"imagenet-png", "imagenet-tar", "imagenet-folder", "folder"}
"""Sources of which earlier versions shuffled training images, but not validation images."""


def has_fair_order(manifest: Manifest, split: str) -> bool:
    """Whether the first images of a split, by id, are a representative sample, not e.g. one class."""
    if manifest.interpretation is not None:
        return manifest.interpretation.fair_order
    source = manifest.recipe.get("source")
    complete = source in PUBLISHED_IN_RANDOM_ORDER and not manifest.recipe.get("allow_partial")
    return complete or (split == "train" and source in SHUFFLED_FOR_TRAINING)


def fair_order(manifest: Manifest, split: str) -> Ids:
    """All ids of a split, int64, in a fixed order in which any first N are a representative sample."""
    count = manifest.splits[split].images
    return np.arange(count, dtype=np.int64) if has_fair_order(manifest, split) else permutation(count, seed=0)


class ImageReader:
    """Reader of the images of one split by positional reads; shards are opened on first use.

    Remote shards are copied to the node cache first. Not thread-safe.
    """

    def __init__(
        self,
        root_url: str,
        manifest: Manifest,
        split: str,
        cache: NodeCache | None = None,
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        """`dtype` is the type of the values in the shards: uint8 in data sets, or a float in sample sets."""
        self.manifest = manifest
        self.split = split
        self.image_shape = manifest.image_shape
        self.dtype = dtype
        store = Store.at(root_url, manifest.name)
        shards = manifest.split_shards(split)
        self._image_bytes = prod(manifest.image_shape) * dtype.itemsize
        self._table = ShardTable(shards, self._image_bytes)
        self._shards = ShardIndex(store, shards, cache or NodeCache(), self._table)

    def __len__(self) -> int:
        """Number of images in the split."""
        return self.manifest.splits[self.split].images

    def read(self, ids: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Read images [n, C, H, W] in `dtype` and labels int64 [n] (-1 without labels) of ids int64 [n].

        Raises IndexError for an id out of range; UserError, naming the shard, for a shard that is missing,
        truncated or damaged even after a second download.
        """
        images = torch.empty((len(ids), *self.image_shape), dtype=self.dtype)
        return images, self.read_into(ids, images)

    def read_into(self, ids: Ids, images: torch.Tensor) -> torch.Tensor:
        """`read` into an existing contiguous CPU tensor; returns the labels."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"ids {ids.min()} .. {ids.max()} are not in 0 .. {len(self) - 1}")
        pixels: NDArray[np.generic] = images.numpy()
        target = pixels.data.cast("B")
        size = self._image_bytes
        # At most as many images as shards can be open at a time.
        images_per_chunk = min(CHUNK_IMAGES, self._shards.limit)
        for first in range(0, len(ids), images_per_chunk):
            chunk = ids[first : first + images_per_chunk]
            self._read_chunk(chunk, target[first * size : (first + len(chunk)) * size])
        return torch.from_numpy(self._table.labels[ids])

    @property
    def remote(self) -> bool:
        """Whether shards are copied to this node."""
        return self._shards.remote

    def prefetch(self, ids: Ids) -> None:
        """Start to copy the shards of these ids to this node."""
        self._shards.prefetch(np.unique(self._table.shards_of(ids)).tolist())

    def close(self) -> None:
        """Close all shards."""
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_chunk(self, ids: Ids, target: memoryview) -> None:
        """Read a chunk of images whose shards can all be open at the same time."""
        shards = self._table.shards_of(ids)
        damaged = self._damaged(ids, self._shards.files(shards), target)
        if not damaged:
            return
        # Read again, from a new copy if the store is remote.
        self._shards.refetch(sorted({int(shards[row]) for row in damaged}))
        damaged = self._damaged(ids, self._shards.files(shards), target)
        if damaged:
            row = damaged[0]
            where = self._shards.where(int(shards[row]))
            raise UserError(
                f"{where}: image {int(ids[row])} of {self.split} is damaged or missing; run "
                f"{repair_command(where.rpartition('/')[2])}"
            )

    def _damaged(self, ids: Ids, files: Sequence[int], target: memoryview) -> list[int]:
        """Read each image; returns the rows that are truncated or whose CRC differs."""
        if self._table.png_places is not None:
            return self._damaged_pngs(ids, files, self._table.png_places[ids], target)
        size, preadv = self._image_bytes, os.preadv
        views = [target[start : start + size] for start in range(0, len(ids) * size, size)]
        # -1, which is not a valid CRC-32, marks a short read.
        crcs = [
            crc32(view) if preadv(file, (view,), offset) == size else -1
            for file, offset, view in zip(files, self._table.offsets_of(ids).tolist(), views, strict=True)
        ]
        return np.flatnonzero(np.array(crcs, np.int64) != self._table.crcs[ids]).tolist()

    def _damaged_pngs(self, ids: Ids, files: Sequence[int], places: Ids, target: memoryview) -> list[int]:
        """`_damaged` for layout image, where each image is a PNG at places[n] = (offset, size)."""
        damaged: list[int] = []
        size = self._image_bytes
        for row, (file, (offset, length)) in enumerate(zip(files, places.tolist(), strict=True)):
            try:
                pixels = decode_png(os.pread(file, length, offset))
            except Exception:  # Pillow raises many kinds of exceptions for damaged files
                damaged.append(row)
                continue
            if pixels.nbytes != size or crc32(pixels.data) != self._table.crcs[ids[row]]:
                damaged.append(row)
                continue
            target[row * size : (row + 1) * size] = pixels.data.cast("B")
        return damaged
