"""What a source of images is to the shard writer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fm_core.data.manifest import Input, Recipe


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be used."""

    key: str
    """What the source calls it, e.g. a path."""
    reason: str
    """A few words, the same for all images with this trouble."""
    sha256: str
    """Of the bytes that were found."""


@dataclass(frozen=True)
class Samples:
    """Consecutive images of a source."""

    images: NDArray[np.uint8]
    """Grey values, uint8 [n, channels, height, width]."""
    labels: NDArray[np.int64] | None
    """0-based classes, int64 [n]; None without labels."""
    rejected: tuple[Rejected, ...] = ()
    """Rows that were left out."""


@dataclass(frozen=True)
class SourcePart:
    """A piece of a source that is read from its beginning to its end."""

    name: str
    """What the user knows it by, e.g. train_data_batch_1."""
    split: str
    """train or val."""
    rows: int
    """Images in it, the unreadable ones included."""
    seekable: bool = True
    """Whether skipping rows is free, so that several processes may share the part."""


@dataclass(frozen=True)
class Classes:
    """What the labels mean."""

    count: int | None
    """Number of classes; None without labels."""
    order: str
    """Name of the order of the classes; "none" without labels."""
    names: tuple[str, ...] | None = None
    """Name of each class, where the source tells."""


UNLABELED = Classes(None, "none")


@dataclass(frozen=True)
class SourceFacts:
    """What is true of all images of a source, by the configuration alone."""

    levels: int
    """Number of grey levels."""
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    recipe: Recipe = field(default_factory=dict)
    """How the pixels come about, from the configuration alone."""
    max_quarantined: float = 0.0
    """Largest share of images that may be left out, unless the user says otherwise."""
    images: int | None = None
    """How many there are in all splits, where that was published; None where only the files tell."""


class PartStream(Protocol):
    """An open part."""

    def skip(self, rows: int) -> None:
        """Leave out the next rows."""
        ...

    def read(self, rows: int) -> Samples:
        """The next rows; those kept and those rejected are together exactly `rows`."""
        ...

    def close(self) -> None:
        """Give back files."""
        ...


class DataSource(Protocol):
    """Images to be sharded. Cheap to pickle: other processes open the parts."""

    @property
    def facts(self) -> SourceFacts:
        """What is true of all images; known without looking at the files."""
        ...

    def classes(self) -> Classes:
        """What the labels mean; may look at the files."""
        ...

    def parts(self) -> Sequence[SourcePart]:
        """The parts, train first; UserError if files are missing or not what they should be."""
        ...

    def inputs(self) -> Sequence[Input]:
        """The files that the parts are made of."""
        ...

    def state(self) -> str:
        """What changes when a file is touched that `inputs` does not name by its content; "" where it does.

        Compared when writing goes on that was interrupted; no part of the data set.
        """
        ...

    def check_labels(self) -> None:
        """Look at the labels of all parts before anything is written; UserError for one out of range.

        May take as long as inflating the archives once.
        """
        ...

    def open(self, part: SourcePart) -> PartStream:
        """Start to read a part; UserError if its content is not what it should be."""
        ...


class ArrayStream:
    """Reads images [n, channels, height, width] and labels [n] from arrays."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        self._images = images
        self._labels = labels
        self._row = 0

    def skip(self, rows: int) -> None:
        """Leave out the next rows."""
        self._row += rows

    def read(self, rows: int) -> Samples:
        """The next rows."""
        chosen = slice(self._row, self._row + rows)
        self._row += rows
        labels = None if self._labels is None else self._labels[chosen]
        return Samples(np.ascontiguousarray(self._images[chosen]), labels)

    def close(self) -> None:
        """Nothing to give back."""
