"""Samples written by `fm sample`, read without the configuration of their run."""

import io
import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from fm_core.data.sample_shard import SampleShard
from fm_core.data.shard_format import NPY_HEADER_BYTES
from fm_core.data.sources.npz_members import read_npy_header
from fm_core.errors import UserError
from fm_core.storage.store import Store

SIDECAR = re.compile(r"samples-\d{6}\.json")


class SampleFiles:
    """Tars in a folder <run>/samples/<step>/<key>, complete and checked against their hashes."""

    kind = "samples"
    manifest = None

    def __init__(self, store: Store) -> None:
        """Read the records. Raises UserError if the samples are not complete."""
        self._store = store
        try:
            self._done: dict[str, Any] = json.loads(store.read_bytes("DONE.json"))
        except (FileNotFoundError, ValueError):
            raise UserError(f"{store.url} is not complete; run fm sample first") from None
        names = sorted(name for name in store.sizes() if SIDECAR.fullmatch(name))
        self._shards = [self._record(name) for name in names]
        self._starts = [shard.first for shard in self._shards]
        self.count = sum(shard.images for shard in self._shards)
        if self.count != self._done.get("protocol", {}).get("images", self.count):
            raise UserError(f"{store.url} lacks some of its tars; run fm sample again")
        start = self._shards[0].block.x_offset
        header = store.read_range(self._shards[0].name, start - NPY_HEADER_BYTES, start)
        channels, height, width = map(int, read_npy_header(io.BytesIO(header))[0][1:])
        self.shape = (channels, height, width)
        self._read: tuple[int, Tensor] | None = None

    @staticmethod
    def are_in(names: Iterable[str]) -> bool:
        """Whether files with these names are samples written by `fm sample`."""
        return any(SIDECAR.fullmatch(name) for name in names)

    def read(self, images: range) -> Tensor:
        """Read consecutive images, uint8 [n, C, H, W]. Raises UserError for a damaged tar."""
        parts, first = list[Tensor](), images.start
        while first < images.stop:
            number = bisect_right(self._starts, first) - 1
            shard = self._shards[number]
            stop = min(images.stop, shard.first + shard.images)
            parts.append(self._pixels(number)[first - shard.first : stop - shard.first])
            first = stop
        return torch.cat(parts)

    def labels(self) -> NDArray[np.int64] | None:
        """Requested class of each image, int64 [N]; None for an unconditional model."""
        labels = list[NDArray[np.int64]]()
        for shard in self._shards:
            start, size = shard.block.y_offset, shard.block.y_bytes
            if start is None or size is None:
                return None
            labels.append(np.frombuffer(self._store.read_range(shard.name, start, start + size), np.int64))
        return np.concatenate(labels)

    def facts(self) -> dict[str, Any]:
        """Protocol of the samples: weights, solver, seed."""
        return dict(self._done.get("protocol", {}))

    def _pixels(self, number: int) -> Tensor:
        if self._read is None or self._read[0] != number:
            shard = self._shards[number]
            if self._store.size(shard.name) != shard.bytes or self._store.sha256(shard.name) != shard.sha256:
                raise UserError(
                    f"{self._store.url}/{shard.name} is missing or damaged; run fm sample to make it again"
                )
            start = shard.block.x_offset
            content = self._store.read_range(shard.name, start, start + shard.block.x_bytes)
            pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self._read = (number, pixels.view(shard.images, *self.shape))
        return self._read[1]

    def _record(self, name: str) -> SampleShard:
        try:
            return SampleShard.model_validate(json.loads(self._store.read_bytes(name)))
        except (ValidationError, ValueError):
            raise UserError(f"{self._store.url}/{name} is damaged; run fm sample to make it again") from None
