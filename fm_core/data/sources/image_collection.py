"""Sources of encoded image files: one collection per split, decoded and resized on reading."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Input, Interpretation, Recipe
from fm_core.data.sources.archive_readers import Archive
from fm_core.data.sources.base import Classes, Rejected, Samples, SourceFacts, SourcePart
from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.image_decoding import RESIZE_TEXTS, PixelRules, decode
from fm_core.data.sources.splits import permutation
from fm_core.errors import AmbiguousIntensitiesError, ImageDecodingError, UserError
from fm_core.storage.hashing import sha256_bytes

FILES_MAX_QUARANTINED = 1e-4
PROBED_IMAGES = 32
"""Number of images whose dtype and range are checked before anything is written."""


@dataclass(frozen=True)
class ImageCollection:
    """The image files of one split."""

    archive: Archive
    """The files."""
    labels: NDArray[np.int64] | None
    """Class of each file of the archive, int64; None without labels."""
    rows: NDArray[np.int64]
    """Indices of the files of the split, in reading order; int64."""


@dataclass(frozen=True)
class FoundImages:
    """Contents of a source."""

    collections: dict[str, ImageCollection]
    """Images by split, train first."""
    classes: Classes
    """Meaning of their labels."""
    interpretation: Interpretation
    """How that was determined."""


def shuffled(archive: Archive, labels: NDArray[np.int64] | None, seed: int) -> ImageCollection:
    """All files in a seeded order, because archives are sorted by class and shards should not be."""
    return ImageCollection(archive, labels, permutation(len(archive.keys), seed))


def in_order(archive: Archive, labels: NDArray[np.int64] | None) -> ImageCollection:
    """All files in key order."""
    return ImageCollection(archive, labels, np.arange(len(archive.keys), dtype=np.int64))


def pixel_rules(config: DataSection, orientation: bool) -> PixelRules:
    """Rules of the configuration; for official sets, EXIF orientation is not applied."""
    return PixelRules(config.source.background, config.source.value_range, orientation)


def pixels_text(rules: PixelRules) -> str:
    """The rules in one line."""
    turned = "EXIF orientation applied" if rules.orientation else "EXIF orientation left as published"
    values = (
        f", values {rules.value_range[0]:g} .. {rules.value_range[1]:g} are black .. white"
        if rules.value_range
        else ""
    )
    return f"{turned}; transparent pixels on {rules.background}{values}"


def pixel_recipe(config: DataSection) -> Recipe:
    """Keys of the recipe for settings that are not the defaults."""
    source = config.source
    recipe: Recipe = {}
    if source.background != "white":
        recipe["background"] = source.background
    if source.value_range is not None:
        recipe["value_range"] = f"{source.value_range[0]:g} .. {source.value_range[1]:g}"
    return recipe


def image_file_facts(
    config: DataSection,
    kind: str,
    extra: Mapping[str, str | int | bool | None] | None = None,
    version: int | None = None,
) -> SourceFacts:
    """Facts of a source whose files are decoded and resized here; UserError without URL or image size.

    `version` is that of the recipe, for formats whose recipe has changed since earlier versions; else None.
    """
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
    changed = pixel_recipe(config)
    if version is None:
        return SourceFacts(256, (3, size, size), {**recipe, **changed}, FILES_MAX_QUARANTINED)
    return SourceFacts(
        256,
        (3, size, size),
        {**recipe, "recipe_version": version, "background": config.source.background, **changed},
        FILES_MAX_QUARANTINED,
        earlier_recipe=None if changed else recipe,
    )


class ImageFileSource(ABC):
    """Base class of sources of image files; subclasses determine the collections."""

    def __init__(self, facts: SourceFacts, resize: str, rules: PixelRules, url: str) -> None:
        self.facts = facts
        self._resize, self._rules, self._url = resize, rules, url
        self._images: FoundImages | None = None

    @abstractmethod
    def find(self) -> FoundImages:
        """Find the images; UserError if files are missing."""

    def classes(self) -> Classes:
        """Meaning of the labels."""
        return self._search().classes

    def interpretation(self) -> Interpretation:
        """How splits, classes and pixels were decided."""
        return self._search().interpretation.model_copy(update={"pixels": pixels_text(self._rules)})

    def parts(self) -> Sequence[SourcePart]:
        """One part for each split, with random access."""
        return [
            SourcePart(split, split, len(collection.rows))
            for split, collection in self._search().collections.items()
        ]

    def inputs(self) -> Sequence[Input]:
        """The archives and folders."""
        return list(dict.fromkeys(item for archive in self._archives() for item in archive.inputs()))

    def state(self) -> str:
        """State of the files that `inputs` does not identify by content."""
        return " ".join(archive.state() for archive in self._archives())

    def check_labels(self) -> None:
        """Find the collections, which checks the labels, and decode some images.

        Raises UserError for values whose range only data.source.value_range can tell.
        """
        for collection in self._search().collections.values():
            step = max(1, len(collection.rows) // PROBED_IMAGES)
            for number in collection.rows[::step][:PROBED_IMAGES].tolist():
                self._stream(collection).probe(number)
            collection.archive.close()

    def open(self, part: SourcePart) -> "ImageFileStream":
        """Open a split."""
        return self._stream(self._search().collections[part.name])

    def release(self) -> None:
        """Remove temporary copies; most formats have none."""
        return

    def _stream(self, collection: ImageCollection) -> "ImageFileStream":
        return ImageFileStream(collection, self.facts.image_shape[-1], self._resize, self._rules, self._url)

    def _archives(self) -> list[Archive]:
        """The archives of all splits, each once."""
        return list({id(item.archive): item.archive for item in self._search().collections.values()}.values())

    def _search(self) -> FoundImages:
        if self._images is None:
            self._images = self.find()
        return self._images


class ImageFileStream:
    """Open collection of image files."""

    def __init__(
        self, collection: ImageCollection, size: int, resize: str, rules: PixelRules, url: str
    ) -> None:
        self._collection, self._size, self._resize = collection, size, resize
        self._rules, self._url = rules, url
        self._row = 0

    def skip(self, rows: int) -> None:
        """Skip the next rows."""
        self._row += rows

    def read(self, rows: int) -> Samples:
        """Decode the next rows; those that cannot be decoded are rejected.

        Raises UserError for values whose range only data.source.value_range can tell.
        """
        images = np.empty((rows, 3, self._size, self._size), np.uint8)
        decoded: list[int] = []
        rejected: list[Rejected] = []
        for number in self._collection.rows[self._row : self._row + rows].tolist():
            content = b""
            try:
                content = self._collection.archive.read(number)
                images[len(decoded)] = decode(content, self._size, self._resize, self._rules)
            except AmbiguousIntensitiesError as error:
                raise self._ambiguous(number, error) from None
            except ImageDecodingError as error:
                key = printable(self._collection.archive.keys[int(number)])
                rejected.append(Rejected(key, str(error), sha256_bytes(content)))
            else:
                decoded.append(number)
        self._row += rows
        labels = None if self._collection.labels is None else self._collection.labels[decoded]
        return Samples(images[: len(decoded)], labels, tuple(rejected))

    def probe(self, number: int) -> NDArray[np.uint8] | None:
        """Decode one file of the archive to uint8 [3, S, S], or None if that fails; errors as for `read`."""
        try:
            content = self._collection.archive.read(number)
            return decode(content, self._size, self._resize, self._rules)
        except AmbiguousIntensitiesError as error:
            raise self._ambiguous(number, error) from None
        except ImageDecodingError:
            return None

    def close(self) -> None:
        """Close the archive."""
        self._collection.archive.close()

    def _ambiguous(self, number: int, error: AmbiguousIntensitiesError) -> UserError:
        key = printable(self._collection.archive.keys[number])
        return ambiguous_values(f"{self._url}/{key}", str(error))


def ambiguous_values(where: str, kind: str) -> UserError:
    """Error for an image whose value range must be given by the user; `kind` is the dtype."""
    return UserError(
        f"{where}: values are {kind}, not uint8 or uint16; "
        "set data.source.value_range to those of black and white, e.g. [0, 1]"
    )


def require_counts(
    url: str, collections: Mapping[str, ImageCollection], published: Mapping[str, int], partial: bool
) -> None:
    """Raise UserError unless the numbers of images are the published ones, or `partial` is true."""
    for split, count in published.items():
        images = len(collections[split].rows) if split in collections else 0
        if images != count and not partial:
            raise UserError(
                f"data.source.url: {url} holds {images:,} {split} images, the published set {count:,}; "
                "set data.source.allow_partial to accept it"
            )


def folder_labels(keys: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Class of each key from its folder, int64; -1 if the folder is not in `names`."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(key.split("/")[-2] if "/" in key else "", -1) for key in keys], np.int64)
