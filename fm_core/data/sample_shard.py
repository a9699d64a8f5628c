"""Records of a sample set on disk: the sidecar of each batch, and the batches that DONE.json lists."""

from typing import Any, Literal

from pydantic import ValidationError

from fm_core.config.section import Section
from fm_core.data.manifest import Block
from fm_core.errors import UserError
from fm_core.storage.hashing import Sha256
from fm_core.storage.local_paths import RelativeName

SCHEMA = 1
DONE = "DONE.json"
"""File that marks a set as complete."""


class FloatShard(Section):
    """The tar of a batch with the ends of the trajectories, before quantization."""

    name: RelativeName
    bytes: int
    sha256: Sha256
    block: Block
    dtype: Literal["float16", "float32"]


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
    floats: FloatShard | None = None
    """The same samples as floats, on request (sample.store)."""

    def record(self) -> dict[str, Any]:
        """The content of the file; without stored floats it is that of earlier versions."""
        return self.model_dump(mode="json", exclude=None if self.floats else {"floats"})

    @property
    def files(self) -> list["SampleShard | FloatShard"]:
        """Name, size and hash of each of its tars."""
        return [self, *([self.floats] if self.floats else [])]


def listed_shards(done: dict[str, Any], where: str) -> list[SampleShard]:
    """The batches that DONE.json lists, in the order of their images; `where` is its URL.

    Raises:
        UserError: the list is damaged, or its images are not 0 .. images - 1.
    """
    try:
        shards = [SampleShard.model_validate(record) for record in done["shards"]]
        images, _ = int(done["protocol"]["images"]), int(done["protocol"]["seed"])
    except (ValidationError, KeyError, TypeError, ValueError):
        raise UserError(f"{where} is damaged; run fm sample to write it again") from None
    first = 0
    for shard in shards:
        if shard.first != first:
            break
        first += shard.images
    if first != images or not shards:
        raise UserError(f"{where} lists {first:,} of {images:,} images; run fm sample to complete the set")
    return shards
