"""On-disk store of a checkpoint's samples: one WebDataset tar per solved batch, and DONE.json at the end."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from fm_core.config import RunConfig
from fm_core.data.sample_shard import DONE, SCHEMA, FloatShard, SampleShard
from fm_core.data.shard_format import ShardFile
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory, step_name
from fm_core.sampling.generate import GeneratedBatch
from fm_core.sampling.sample_protocol import sample_key
from fm_core.storage.store import Store


class SampleSet:
    """The samples of one checkpoint under one protocol."""

    def __init__(self, config: RunConfig, step: int, protocol: dict[str, Any]) -> None:
        self.protocol, self.step = protocol, step
        self.key = sample_key(config, protocol)
        self.images, self.batch = config.sample.images, config.sample.batch
        self.trajectories = min(config.sample.trajectories, self.images, self.batch)
        """Images of batch 0 whose trajectory from noise is saved."""
        self.floats: Literal["float16", "float32"] | None = protocol.get("store")
        """Type of the floats that are stored beside the intensity levels; None for none."""
        directory = RunDirectory(config)
        self.store = Store.at(directory.samples, step_name(step), self.key)
        self.control = directory.path / "samples" / step_name(step) / self.key
        """Directory of the sampling job's lock, job.json and status, always on the submitting host."""
        self._sizes: dict[str, int] | None = None
        """File sizes in the last listing."""
        self._records: dict[int, SampleShard] = {}
        """Sidecars of the batches that are known to be complete, by number."""

    @property
    def batches(self) -> int:
        """Number of tars."""
        return -(-self.images // self.batch)

    def extent(self, number: int) -> tuple[int, int]:
        """Index of the first image and number of images of a batch."""
        first = number * self.batch
        return first, min(self.batch, self.images - first)

    def write(self, number: int, batch: GeneratedBatch) -> None:
        """Write a batch: its trajectory if it has one, the tar, that of its floats, then the sidecar."""
        name = _tar(number)
        if batch.trajectory is not None and self.trajectories:
            buffer = io.BytesIO()
            np.save(buffer, batch.trajectory[:, : self.trajectories].numpy())
            self.store.write_bytes(self._trajectory, buffer.getvalue())
        labels = None if batch.labels is None else batch.labels.numpy()
        shard, digest = self._write_tar(name, number, batch.images.numpy(), labels)
        record = SampleShard(
            name=name,
            bytes=shard.bytes,
            sha256=digest,
            first=batch.first,
            images=len(batch.images),
            block=shard.blocks[0],
            nfe=batch.nfe,
            accepted=batch.accepted,
            rejected=batch.rejected,
            forwards=batch.forwards,
            guide_nfe=batch.guide_nfe,
            floats=self._write_floats(number, batch, labels),
        )
        self.store.write_bytes(_sidecar(number), json.dumps(record.record(), indent=1).encode())
        self._records[number] = record

    def _write_floats(
        self, number: int, batch: GeneratedBatch, labels: NDArray[np.int64] | None
    ) -> FloatShard | None:
        if self.floats is None:
            return None
        name, ends = _float_tar(number), batch.ends.cpu().numpy().astype(self.floats)
        shard, digest = self._write_tar(name, number, ends, labels)
        return FloatShard(
            name=name, bytes=shard.bytes, sha256=digest, block=shard.blocks[0], dtype=self.floats
        )

    def _write_tar(
        self, name: str, number: int, images: NDArray[np.generic], labels: NDArray[np.int64] | None
    ) -> tuple[ShardFile, str]:
        """Write one block as a tar; returns it and the SHA-256 of the file."""
        with self.store.staged(name) as (_, file):
            shard = ShardFile(file, number)
            shard.add_block(0, images, labels)
            return shard, shard.finish()

    def shard(self, number: int) -> SampleShard | None:
        """The sidecar of a batch; None if the batch is missing or incomplete."""
        record = self._read_sidecar(number)
        complete = record and all(self.store.size(file.name) == file.bytes for file in record.files)
        return record if complete else None

    def _read_sidecar(self, number: int) -> SampleShard | None:
        content = self._record(_sidecar(number), "schema_version")
        if content is None:
            return None
        try:
            record = SampleShard.model_validate(content)
        except ValidationError:
            return None
        return record if (record.floats and record.floats.dtype) == self.floats else None

    def complete(self, number: int) -> bool:
        """Whether a batch, checked by its size, and its trajectory exist.

        The folder is listed once, at the first call: no other rank writes the batches of this rank, and
        listing the folder again after each batch would make the number of requests quadratic.
        """
        if self._sizes is None:
            self._sizes = self.store.sizes()
        if number == 0 and self.trajectories and self._trajectory not in self._sizes:
            return False
        return self._complete_record(number, self._sizes) is not None

    def finished(self) -> list[SampleShard]:
        """Sidecars of the existing batches, by one listing and one request per new sidecar."""
        self._sizes = self.store.sizes()
        records = (self._complete_record(number, self._sizes) for number in range(self.batches))
        return [record for record in records if record]

    def problems(self) -> list[int]:
        """Numbers of batches that are missing or differ from their hash; reads every batch again."""
        self._sizes = None
        self._records.clear()
        return [
            number
            for number in range(self.batches)
            if not self.complete(number) or not self._intact(self._records.get(number))
        ]

    def _complete_record(self, number: int, sizes: Mapping[str, int]) -> SampleShard | None:
        """The sidecar of a batch whose listed size is right, else None; it is read only once."""
        if number not in self._records and _sidecar(number) in sizes:
            record = self._read_sidecar(number)
            if record and all(sizes.get(file.name) == file.bytes for file in record.files):
                self._records[number] = record
        return self._records.get(number)

    def remove(self, number: int) -> None:
        """Remove a batch, so that it is generated again."""
        self._records.pop(number, None)
        self.store.remove(_sidecar(number))
        self.store.remove(_tar(number))
        if self.floats:
            self.store.remove(_float_tar(number))

    def read(self, shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Pixels of each batch in order, uint8 [n, *shape]; raises UserError like `read_batch`."""
        return (self.read_batch(number, shape) for number in range(self.batches))

    def read_batch(self, number: int, shape: tuple[int, int, int]) -> Tensor:
        """Pixels of one batch, uint8 [n, *shape].

        Raises UserError for a tar that is missing or differs from its record.
        """
        record = self._intact_shard(number)
        start = record.block.x_offset
        pixels = self.store.read_range(record.name, start, start + record.block.x_bytes)
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(record.images, *shape)

    def read_labels(self, number: int) -> Tensor | None:
        """The requested classes of one batch, int64 [n], or None; raises UserError like `read_batch`."""
        record = self._intact_shard(number)
        start, size = record.block.y_offset, record.block.y_bytes
        if start is None or size is None:
            return None
        content = self.store.read_range(record.name, start, start + size)
        return torch.frombuffer(bytearray(content), dtype=torch.int64)

    def trajectory(self) -> Tensor | None:
        """The trajectory of the first images from noise, uint8 [T, n, C, H, W], or None."""
        if not self.trajectories or self.store.size(self._trajectory) is None:
            return None
        return torch.from_numpy(np.load(io.BytesIO(self.store.read_bytes(self._trajectory))))

    def done(self) -> dict[str, Any] | None:
        """DONE.json, or None."""
        return self._record(DONE, "schema")

    @property
    def _trajectory(self) -> str:
        return f"trajectory-{self.trajectories}.npy"

    def _intact_shard(self, number: int) -> SampleShard:
        record = self.shard(number)
        if record is None or self.store.sha256(record.name) != record.sha256:
            raise UserError(
                f"{self.store.url}/{_tar(number)} is missing or damaged; run fm sample to make it again"
            )
        return record

    def _intact(self, record: SampleShard | None) -> bool:
        return record is not None and all(
            self.store.sha256(file.name) == file.sha256 for file in record.files
        )

    def _record(self, name: str, version: str) -> dict[str, Any] | None:
        """Read a JSON file; None if missing or not JSON. Raises UserError if another version wrote it."""
        try:
            record = json.loads(self.store.read_bytes(name))
        except (FileNotFoundError, ValueError):
            return None
        if record.get(version) != SCHEMA:
            where = f"{self.store.url}/{name}: schema {record.get(version)!r}"
            raise UserError(f"{where}; this version of the program reads {SCHEMA}")
        return record

    def finish(self, facts: dict[str, Any]) -> None:
        """Write DONE.json, which marks the set of images as complete."""
        shards = [record.record() for record in self.finished()]
        record = {"schema": SCHEMA, "protocol": self.protocol, **facts, "shards": shards}
        self.store.write_bytes(DONE, json.dumps(record, indent=1).encode())


def _tar(number: int) -> str:
    return f"samples-{number:06d}.tar"


def _float_tar(number: int) -> str:
    return f"floats-{number:06d}.tar"


def _sidecar(number: int) -> str:
    return f"samples-{number:06d}.json"
