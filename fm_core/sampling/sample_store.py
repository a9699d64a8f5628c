"""On-disk store of a checkpoint's samples: one WebDataset tar per solved batch, and DONE.json at the end."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from fm_core.config import RunConfig, Section
from fm_core.data.manifest import Block
from fm_core.data.shard_format import ShardFile
from fm_core.data.sources.base import Samples
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory, step_name
from fm_core.sampling.generate import GeneratedBatch
from fm_core.sampling.sample_protocol import sample_key
from fm_core.storage.hashing import Sha256
from fm_core.storage.local_paths import RelativeName
from fm_core.storage.store import Store

SCHEMA = 1


class SampleShard(Section):
    """Sidecar of a tar, written after the tar, which is complete if its size matches."""

    schema_version: int = SCHEMA
    name: RelativeName
    bytes: int
    sha256: Sha256
    first: int
    """Index of the first image."""
    images: int
    block: Block
    nfe: int
    """Network evaluations (NFE) per image of this batch, of all networks."""
    accepted: int | None
    rejected: int | None
    forwards: int = 1
    """Network evaluations per evaluation of the field: two with guidance, inside its interval."""
    guide_nfe: int = 0
    """The part of nfe spent in the weaker network of autoguidance."""


class SampleSet:
    """The samples of one checkpoint under one protocol."""

    def __init__(self, config: RunConfig, step: int, protocol: dict[str, Any]) -> None:
        self.protocol, self.step = protocol, step
        self.key = sample_key(config, protocol)
        self.images, self.batch = config.sample.images, config.sample.batch
        self.trajectories = min(config.sample.trajectories, self.images, self.batch)
        """Images of batch 0 whose trajectory from noise is saved."""
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
        """Write a batch: its trajectory if it has one, the tar, then the sidecar."""
        name = _tar(number)
        if batch.trajectory is not None and self.trajectories:
            buffer = io.BytesIO()
            np.save(buffer, batch.trajectory[:, : self.trajectories].numpy())
            self.store.write_bytes(self._trajectory, buffer.getvalue())
        labels = None if batch.labels is None else batch.labels.numpy()
        with self.store.staged(name) as (_, file):
            shard = ShardFile(file, number)
            shard.add(0, Samples(batch.images.numpy(), labels))
            digest = shard.finish()
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
        )
        self.store.write_bytes(_sidecar(number), record.model_dump_json(indent=1).encode())
        self._records[number] = record

    def shard(self, number: int) -> SampleShard | None:
        """The sidecar of a batch; None if the batch is missing or incomplete."""
        record = self._read_sidecar(number)
        return record if record and self.store.size(record.name) == record.bytes else None

    def _read_sidecar(self, number: int) -> SampleShard | None:
        content = self._record(_sidecar(number), "schema_version")
        if content is None:
            return None
        try:
            return SampleShard.model_validate(content)
        except ValidationError:
            return None

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
            if record and sizes.get(record.name) == record.bytes:
                self._records[number] = record
        return self._records.get(number)

    def remove(self, number: int) -> None:
        """Remove a batch, so that it is generated again."""
        self._records.pop(number, None)
        self.store.remove(_sidecar(number))
        self.store.remove(_tar(number))

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
        return self._record("DONE.json", "schema")

    @property
    def _trajectory(self) -> str:
        return f"trajectory-{self.trajectories}.npy"

    def _intact_shard(self, number: int) -> SampleShard:
        record = self.shard(number)
        if record is None or not self._intact(record):
            raise UserError(
                f"{self.store.url}/{_tar(number)} is missing or damaged; run fm sample to make it again"
            )
        return record

    def _intact(self, record: SampleShard | None) -> bool:
        return record is not None and self.store.sha256(record.name) == record.sha256

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
        shards = [record.model_dump(mode="json") for record in self.finished()]
        record = {"schema": SCHEMA, "protocol": self.protocol, **facts, "shards": shards}
        self.store.write_bytes("DONE.json", json.dumps(record, indent=1).encode())


def _tar(number: int) -> str:
    return f"samples-{number:06d}.tar"


def _sidecar(number: int) -> str:
    return f"samples-{number:06d}.json"
