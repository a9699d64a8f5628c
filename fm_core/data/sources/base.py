"""Protocol of image sources, and the records that they exchange with the shard writer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fm_core.data.manifest import Input, Interpretation, Recipe


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be used."""

    key: str
    """Name in the source, e.g. a path."""
    reason: str
    """Short reason, the same for all images with this problem."""
    sha256: str
    """SHA-256 of the bytes that were read, in hexadecimal."""


@dataclass(frozen=True)
class Samples:
    """Consecutive images of a source."""

    images: NDArray[np.uint8]
    """Intensities, uint8 [n, channels, height, width]."""
    labels: NDArray[np.int64] | None
    """0-based classes, int64 [n]; None without labels."""
    rejected: tuple[Rejected, ...] = ()
    """Images that were omitted."""


@dataclass(frozen=True)
class SourcePart:
    """Part of a source that is read sequentially."""

    name: str
    """Name for messages, e.g. train_data_batch_1."""
    split: str
    """train, or val for validation."""
    rows: int
    """Number of images, including unreadable ones."""
    seekable: bool = True
    """Whether skipping rows costs nothing, so that several processes can share the part."""


@dataclass(frozen=True)
class Classes:
    """Meaning of the labels."""

    count: int | None
    """Number of classes; None without labels."""
    order: str
    """Name of the order of the classes; "none" without labels."""
    names: tuple[str, ...] | None = None
    """Name of each class, if the source has names."""


UNLABELED = Classes(None, "none")


@dataclass(frozen=True)
class SourceFacts:
    """Properties of all images of a source that follow from the configuration."""

    levels: int
    """Number of intensity levels."""
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    recipe: Recipe = field(default_factory=dict)
    """How the pixels are produced; recorded in the manifest."""
    max_quarantined: float = 0.0
    """Largest fraction of images that may be omitted unless data.max_quarantined is set."""
    images: int | None = None
    """Published number of images in all splits; None if it depends on the files."""
    earlier_recipe: Recipe | None = None
    """Recipe of earlier versions for this configuration; such data sets are read, but not rewritten."""


class PartStream(Protocol):
    """Open part of a source."""

    def skip(self, rows: int) -> None:
        """Skip the next rows."""
        ...

    def read(self, rows: int) -> Samples:
        """Read the next rows; samples and rejected images together are exactly `rows`."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


class DataSource(Protocol):
    """Images to be sharded. Cheap to pickle, because other processes open the parts."""

    @property
    def facts(self) -> SourceFacts:
        """Properties of all images, known without reading the files."""
        ...

    def classes(self) -> Classes:
        """Meaning of the labels; may read the files."""
        ...

    def interpretation(self) -> Interpretation:
        """How splits, classes and pixels were decided; may read the files."""
        ...

    def parts(self) -> Sequence[SourcePart]:
        """The parts, train first; UserError if files are missing or differ from the published set."""
        ...

    def inputs(self) -> Sequence[Input]:
        """The files of the parts."""
        ...

    def state(self) -> str:
        """Value that changes with files that `inputs` does not identify by content; "" if there are none.

        Compared when an interrupted write continues; not part of the data set.
        """
        ...

    def check_labels(self) -> None:
        """Check the labels of all parts before anything is written; UserError for a label out of range.

        May take as long as decompressing all archives.
        """
        ...

    def open(self, part: SourcePart) -> PartStream:
        """Open a part; UserError if its content differs from the published set."""
        ...

    def release(self) -> None:
        """Remove temporary copies; a later read recreates them."""
        ...


class ArrayStream:
    """Part of a source in memory: images uint8 [n, channels, height, width] and labels int64 [n]."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        self._images = images
        self._labels = labels
        self._row = 0

    def skip(self, rows: int) -> None:
        """Skip the next rows."""
        self._row += rows

    def read(self, rows: int) -> Samples:
        """Read the next rows."""
        selected = slice(self._row, self._row + rows)
        self._row += rows
        labels = None if self._labels is None else self._labels[selected]
        return Samples(np.ascontiguousarray(self._images[selected]), labels)

    def close(self) -> None:
        """Does nothing."""
