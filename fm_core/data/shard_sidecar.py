"""Sidecar of a written shard: marks the shard as complete and contains its entry for the manifest.

commits/train-000012.json is written after train-000012.tar is complete under its name. A shard without a
sidecar is treated as missing.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from fm_core.data.manifest import Block, Record, read_record
from fm_core.errors import UserError
from fm_core.storage.local_paths import RelativeName
from fm_core.storage.store import Store

SIDECAR_SCHEMA = 1
SIDECAR_FOLDER = "commits"
REMOVE = "remove it and run fm shard again"
MOMENTS_ROWS = 16


class RejectedImage(Record):
    """An image that was omitted."""

    key: str
    """Name of the image in the source, e.g. a path."""
    reason: str
    """Why it was omitted, as reported by the source."""
    sha256: str
    """SHA-256 of the bytes that were read."""


class PixelMoments(Record):
    """Exact integer sums over pixels, independent of the order of summation."""

    pixels: int = 0
    """Number of pixels in one channel."""
    sums: tuple[int, ...] = ()
    """Sum of the intensities of each channel."""
    squares: tuple[int, ...] = ()
    """Sum of the squared intensities of each channel."""

    def plus(self, other: "PixelMoments") -> "PixelMoments":
        """Sums over both sets of images."""
        if not self.pixels:
            return other
        return PixelMoments(
            pixels=self.pixels + other.pixels,
            sums=tuple(map(sum, zip(self.sums, other.sums, strict=True))),
            squares=tuple(map(sum, zip(self.squares, other.squares, strict=True))),
        )

    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, in intensity levels."""
        return tuple(total / self.pixels for total in self.sums)

    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, in intensity levels."""
        return tuple(
            (max(0, square * self.pixels - total**2) ** 0.5) / self.pixels
            for total, square in zip(self.sums, self.squares, strict=True)
        )


class ShardSidecar(Record):
    """Record of one written shard."""

    schema_version: Literal[1] = SIDECAR_SCHEMA
    """Schema version of the file."""
    name: RelativeName
    """File name of the shard."""
    split: str
    """train, or val for validation."""
    bytes: int
    """Size of the file in bytes; 0 if all of its images were rejected and there is no file."""
    sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")
    """SHA-256 of the file, in hexadecimal; empty if there is no file."""
    images: int
    """Number of images in the shard."""
    blocks: tuple[Block, ...]
    """Blocks of the shard; none in layout image."""
    index_offset: int | None = None
    """Layout image: offset of the index in bytes."""
    class_histogram: tuple[int, ...] | None
    """Number of images of each class; None without labels."""
    moments: PixelMoments
    """Sums over the pixels."""
    rejected: tuple[RejectedImage, ...] = ()
    """Images that were omitted."""


def moments_of(images: NDArray[np.uint8], levels: int) -> PixelMoments:
    """Sums over images uint8 [n, C, H, W] with intensities below `levels`; UserError for a larger one."""
    if not len(images):
        return PixelMoments()
    if int(images.max()) >= levels:
        raise UserError(f"the source holds intensities up to {images.max()}; expected at most {levels - 1}")
    rows = images.reshape(*images.shape[:2], -1)
    sums, squares = np.zeros(len(rows[0]), np.int64), np.zeros(len(rows[0]), np.int64)
    for first in range(0, len(rows), MOMENTS_ROWS):
        # Integers below 2^53: exact in float64 in any order, and ten times as fast as integer sums.
        chunk = rows[first : first + MOMENTS_ROWS].astype(np.float64)
        sums += chunk.sum(axis=(0, 2)).astype(np.int64)
        squares += (chunk[:, :, None] @ chunk[:, :, :, None]).sum(axis=(0, 2, 3)).astype(np.int64)
    return PixelMoments(pixels=images[:, 0].size, sums=tuple(sums.tolist()), squares=tuple(squares.tolist()))


def sidecar_path(shard_name: str) -> str:
    """Path of a shard's sidecar relative to the data set's folder."""
    return f"{SIDECAR_FOLDER}/{shard_name.removesuffix('.tar')}.json"


def read_sidecars(store: Store, names: list[str]) -> dict[str, ShardSidecar]:
    """Sidecars that exist and whose shard has the right size, by shard name; UserError for a damaged one."""
    files = Store.at(store.url, SIDECAR_FOLDER).sizes()
    sizes = store.sizes()
    sidecars: dict[str, ShardSidecar] = {}
    for name in names:
        path = sidecar_path(name)
        if path.rsplit("/", 1)[-1] not in files:
            continue
        where = f"{store.url}/{path}"
        try:
            sidecar = ShardSidecar.model_validate(
                read_record(store.read_bytes(path), where, SIDECAR_SCHEMA, REMOVE)
            )
        except ValidationError:
            raise UserError(f"{where}: damaged; {REMOVE}") from None
        if sidecar.bytes == sizes.get(name, 0):
            sidecars[name] = sidecar
    return sidecars
