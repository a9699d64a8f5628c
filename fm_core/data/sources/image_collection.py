"""Sources of encoded image files: a collection per split, decoded and resized when it is read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Input, Recipe
from fm_core.data.sources.archive_readers import Archive
from fm_core.data.sources.base import Classes, Rejected, Samples, SourceFacts, SourcePart
from fm_core.data.sources.image_decoding import RESIZE_TEXTS, decode
from fm_core.data.sources.splits import permutation
from fm_core.errors import ImageDecodingError, UserError
from fm_core.storage.hashing import sha256_bytes

FILES_MAX_QUARANTINED = 1e-4


@dataclass(frozen=True)
class ImageCollection:
    """The image files of one split."""

    archive: Archive
    """The files."""
    labels: NDArray[np.int64] | None
    """Class of each file of the archive, int64; None without labels."""
    rows: NDArray[np.int64]
    """Numbers of the files in the split, in the order in which they are read; int64."""


def shuffled(archive: Archive, labels: NDArray[np.int64] | None, seed: int) -> ImageCollection:
    """All files in a seeded order, as archives are sorted by class, which shards should not be."""
    return ImageCollection(archive, labels, permutation(len(archive.keys), seed))


def in_order(archive: Archive, labels: NDArray[np.int64] | None) -> ImageCollection:
    """All files in the order of their keys."""
    return ImageCollection(archive, labels, np.arange(len(archive.keys), dtype=np.int64))


def image_file_facts(
    config: DataSection, kind: str, extra: Mapping[str, str | int | bool | None] | None = None
) -> SourceFacts:
    """Facts of a source whose files are decoded and resized here; UserError without URL or image size."""
    size = config.source.image_size
    if not (config.source.url and size):
        raise UserError(f"data.source.format {kind} needs data.source.url and data.source.image_size")
    recipe: Recipe = {
        "source": kind,
        "image_size": size,
        "resize": RESIZE_TEXTS[config.source.resize],
        "order_seed": config.split_seed,
        **(extra or {}),
    }
    return SourceFacts(256, (3, size, size), recipe, FILES_MAX_QUARANTINED)


class ImageFileSource(ABC):
    """Base of sources of image files; formats differ in how the collections are found."""

    def __init__(self, facts: SourceFacts, resize: str) -> None:
        self.facts = facts
        self._resize = resize
        self._found: tuple[dict[str, ImageCollection], Classes] | None = None

    @abstractmethod
    def find(self) -> tuple[dict[str, ImageCollection], Classes]:
        """Collections by split, train first, and what their labels mean; UserError if files are missing."""

    def classes(self) -> Classes:
        """Meaning of the labels."""
        return self._search()[1]

    def parts(self) -> Sequence[SourcePart]:
        """One part for each split; any row can be read first."""
        return [
            SourcePart(split, split, len(collection.rows)) for split, collection in self._search()[0].items()
        ]

    def inputs(self) -> Sequence[Input]:
        """The archives and folders."""
        inputs = [item for collection in self._search()[0].values() for item in collection.archive.inputs()]
        return list(dict.fromkeys(inputs))

    def state(self) -> str:
        """State of the files that `inputs` does not identify by content."""
        return " ".join(collection.archive.state() for collection in self._search()[0].values())

    def check_labels(self) -> None:
        """Find the collections; labels come from names and are checked there."""
        self._search()

    def open(self, part: SourcePart) -> "ImageFileStream":
        """Open a split."""
        return ImageFileStream(self._search()[0][part.name], self.facts.image_shape[-1], self._resize)

    def _search(self) -> tuple[dict[str, ImageCollection], Classes]:
        if self._found is None:
            self._found = self.find()
        return self._found


class ImageFileStream:
    """Open collection of image files."""

    def __init__(self, collection: ImageCollection, size: int, resize: str) -> None:
        self._collection, self._size, self._resize = collection, size, resize
        self._row = 0

    def skip(self, rows: int) -> None:
        """Skip the next rows."""
        self._row += rows

    def read(self, rows: int) -> Samples:
        """Decode the next rows; those that cannot be decoded are rejected."""
        images = np.empty((rows, 3, self._size, self._size), np.uint8)
        decoded: list[int] = []
        rejected: list[Rejected] = []
        for number in self._collection.rows[self._row : self._row + rows].tolist():
            content = self._collection.archive.read(number)
            try:
                images[len(decoded)] = decode(content, self._size, self._resize)
            except ImageDecodingError as error:
                key = self._collection.archive.keys[number]
                rejected.append(Rejected(key, str(error), sha256_bytes(content)))
            else:
                decoded.append(number)
        self._row += rows
        labels = None if self._collection.labels is None else self._collection.labels[decoded]
        return Samples(images[: len(decoded)], labels, tuple(rejected))

    def close(self) -> None:
        """Close the archive."""
        self._collection.archive.close()


def require_counts(
    url: str, collections: Mapping[str, ImageCollection], published: Mapping[str, int], partial: bool
) -> None:
    """Raise UserError unless the numbers of images are those published, or `partial` is true."""
    for split, count in published.items():
        images = len(collections[split].rows) if split in collections else 0
        if images != count and not partial:
            raise UserError(
                f"data.source.url: {url} holds {images:,} {split} images, the published set {count:,}; "
                "set data.source.allow_partial to accept it"
            )


def folder_labels(keys: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Class of each key by its folder, int64; -1 if the folder is not in `names`."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(key.split("/")[-2] if "/" in key else "", -1) for key in keys], np.int64)
