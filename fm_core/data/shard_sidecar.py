"""The sidecar of a written shard: its commit mark, and what the manifest needs to know of it.

commits/train-000012.json is written after train-000012.tar is whole in its place. A shard without
it does not exist.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fm_core.data.manifest import Block, Record, read_record
from fm_core.errors import UserError
from fm_core.storage.store import Store

COMMIT_SCHEMA = 1
COMMIT_FOLDER = "commits"
MOMENTS_ROWS = 16


class RejectedImage(Record):
    """An image that was left out."""

    key: str
    """What the source calls it."""
    reason: str
    """Why."""
    sha256: str
    """Of the bytes that were found."""


class PixelMoments(Record):
    """Exact sums over images, so that they do not depend on who added them up."""

    pixels: int = 0
    """Pixels of one channel."""
    sums: tuple[int, ...] = ()
    """Sum of the grey values of each channel."""
    squares: tuple[int, ...] = ()
    """Sum of their squares."""

    def plus(self, other: "PixelMoments") -> "PixelMoments":
        """Both together."""
        if not self.pixels:
            return other
        return PixelMoments(
            pixels=self.pixels + other.pixels,
            sums=tuple(map(sum, zip(self.sums, other.sums, strict=True))),
            squares=tuple(map(sum, zip(self.squares, other.squares, strict=True))),
        )

    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, in grey levels."""
        return tuple(total / self.pixels for total in self.sums)

    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, in grey levels."""
        return tuple(
            (max(0, square * self.pixels - total**2) ** 0.5) / self.pixels
            for total, square in zip(self.sums, self.squares, strict=True)
        )


class ShardSidecar(Record):
    """One written shard."""

    schema_version: Literal[1] = COMMIT_SCHEMA
    """Version of this file's form."""
    name: str
    """The shard's file."""
    split: str
    """train or val."""
    bytes: int
    """Size of the file; 0 if all of its images were rejected and there is no file."""
    sha256: str
    """SHA-256 of the file."""
    images: int
    """Images in it."""
    blocks: tuple[Block, ...]
    """Its blocks; none in layout image."""
    index_offset: int | None = None
    """Layout image: where the index is."""
    class_histogram: tuple[int, ...] | None
    """Images of each class; None without labels."""
    moments: PixelMoments
    """Sums over the pixels."""
    rejected: tuple[RejectedImage, ...] = ()
    """Images that were left out."""


def moments_of(images: NDArray[np.uint8], levels: int) -> PixelMoments:
    """Sums over images [n, C, H, W] with values below `levels`; UserError for a larger value."""
    if not len(images):
        return PixelMoments()
    if int(images.max()) >= levels:
        raise UserError(f"the source holds grey values up to {images.max()}; {levels} levels were expected")
    rows = images.reshape(*images.shape[:2], -1)
    sums, squares = np.zeros(len(rows[0]), np.int64), np.zeros(len(rows[0]), np.int64)
    for first in range(0, len(rows), MOMENTS_ROWS):
        # Whole numbers below 2^53: exact in float64 whatever the order, and ten times as fast as counting.
        piece = rows[first : first + MOMENTS_ROWS].astype(np.float64)
        sums += piece.sum(axis=(0, 2)).astype(np.int64)
        squares += (piece[:, :, None] @ piece[:, :, :, None]).sum(axis=(0, 2, 3)).astype(np.int64)
    return PixelMoments(pixels=images[:, 0].size, sums=tuple(sums.tolist()), squares=tuple(squares.tolist()))


def sidecar_path(shard_name: str) -> str:
    """Where the sidecar of a shard is, below the data set's folder."""
    return f"{COMMIT_FOLDER}/{shard_name.removesuffix('.tar')}.json"


def read_sidecars(store: Store, names: list[str]) -> dict[str, ShardSidecar]:
    """The sidecars that are there and whose shard has the right size, by shard name."""
    marks = Store.at(store.url, COMMIT_FOLDER).sizes()
    sizes = store.sizes()
    commits: dict[str, ShardSidecar] = {}
    for name in names:
        path = sidecar_path(name)
        if path.rsplit("/", 1)[-1] not in marks:
            continue
        where = f"{store.url}/{path}"
        try:
            commit = ShardSidecar.model_validate(read_record(store.read_bytes(path), where, COMMIT_SCHEMA))
        except ValidationError:
            raise UserError(f"{where}: damaged; remove it and run fm shard again") from None
        if commit.bytes == sizes.get(name, 0):
            commits[name] = commit
    return commits
