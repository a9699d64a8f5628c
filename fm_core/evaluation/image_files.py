"""Images to score without a run: image files in folders, zips and tars, .npz files, samples, data sets.

Image files are decoded by the rules of sharding. No image is resized or skipped: a file that cannot be used
causes an error that names the file.
"""

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fm_core.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from fm_core.data.reader import ImageReader, fair_order
from fm_core.data.sources.archive_readers import Archive, ArchiveGroup
from fm_core.data.sources.class_folders import class_folders, edm_labels
from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.folder import open_tree
from fm_core.data.sources.image_decoding import PixelRules, decode
from fm_core.data.sources.split_words import split_of_folder
from fm_core.data.sources.splits import ImagePlace
from fm_core.data.sources.tar_archive import open_archive
from fm_core.errors import AmbiguousIntensitiesError, ImageDecodingError, UserError
from fm_core.evaluation.image_sources import IGNORED_SUFFIXES
from fm_core.evaluation.npz_images import NpzImages
from fm_core.evaluation.sample_files import SampleFiles
from fm_core.storage.store import Store

MIN_IMAGES = 4
"""Minimum number of images in a set; with fewer, a distance has no error estimate."""
BESIDE_IMAGES = IGNORED_SUFFIXES | {".cls"}
"""Suffixes of other files that are allowed next to the images."""
NATIVE = "none"
"""Value of `resize` that makes `decode` keep the size of an image."""
LOSSY = ("JPEG", "WEBP", "AVIF")
"""Pillow's names of the formats whose files may contain other pixels than were saved."""


class ImageSet(Protocol):
    """Images of one size, read by index."""

    @property
    def kind(self) -> str:
        """Kind of the images: files, npz, samples, or a split of a data set."""
        ...

    @property
    def count(self) -> int:
        """Number of images."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """Manifest of a data set, whose intensity levels and classifier apply; None for other images."""
        ...

    def read(self, images: range) -> Tensor:
        """Read consecutive images, uint8 [n, C, H, W]. Raises UserError that names a damaged file."""
        ...

    def labels(self) -> NDArray[np.int64] | None:
        """Class of each image, int64 [N]; None if the classes are unknown."""
        ...

    def facts(self) -> dict[str, Any]:
        """Properties of the images that the protocol records; complete once the images have been read."""
        ...


def open_images(location: str, key: str) -> ImageSet:
    """Open the images at a path or URL; messages name the configuration key `key`.

    Raises UserError, in one line, if there are no images, fewer than four, or unsupported files.
    """
    try:
        images = _open(location, key)
    except UserError as error:  # readers of data sources name the key of a data source
        raise UserError(str(error).replace("data.source.url", key)) from None
    if images.count < MIN_IMAGES:
        raise UserError(
            f"{key}: {printable(location)} contains {images.count} images; scores and their errors need at "
            f"least {MIN_IMAGES}"
        )
    return images


def _open(location: str, key: str) -> ImageSet:
    if location.lower().endswith(".npz"):
        return _NpzSet(Path(location))
    if "{" in location:
        return FileImages(location, _braces(location, key), key)
    if dataset := _open_dataset(location):
        return dataset
    place = Store.at(location)
    names = set(place.sizes())
    if SampleFiles.are_in(names):
        return SampleFiles(place)
    if {"config.yaml", "environment.json"} <= names:
        raise UserError(
            f"{key}: {printable(location)} is a run; name its samples/<step>/<key>, or give --config"
        )
    archive, _, other_files = open_tree(location)
    if other_files:
        raise UserError(
            f"{key}: {printable(location)} holds {printable(other_files[0])} beside archives; remove it"
        )
    if not archive.keys and not archive.others and not _exists(place):
        raise UserError(
            f"{key}: {printable(location)} does not exist; name a folder of images, an .npz file, tars, or "
            "a data set"
        )
    return FileImages(location, archive, key)


def _exists(place: Store) -> bool:
    return place.local is None or place.local.exists()


def _braces(location: str, key: str) -> Archive:
    """Open the tars of a pattern such as part-{000..011}.tar."""
    import webdataset  # imported here because the import takes half a second

    archives: list[tuple[str, Archive]] = []
    for url in cast(list[str], cast(Any, webdataset).shardlists.expand_urls(location)):
        folder, _, name = url.rpartition("/")
        store = Store.at(folder or ("/" if url.startswith("/") else "."))
        if not name.lower().endswith((".tar", ".zip")) or store.size(name) is None:
            raise UserError(f"{key}: {printable(url)} is no .tar or .zip file")
        archives.append((name, open_archive(store, name)))
    return ArchiveGroup(archives)


def _open_dataset(location: str) -> "DatasetImages | None":
    """Open the data set at <folder>, or its split at <folder>/<split>; None if there is no data set."""
    folder, _, name = location.rstrip("/").rpartition("/")
    for place, split in ((location.rstrip("/"), "train"), (folder, name)):
        above, _, own = place.rpartition("/")
        if own and split in ("train", "val") and _holds_manifest(Store.at(place)):
            root = above or ("/" if place.startswith("/") else ".")
            return DatasetImages(root, load_manifest(root, own), split)
    return None


def _holds_manifest(place: Store) -> bool:
    if place.local is not None and not place.local.is_dir():
        return False
    return place.size(MANIFEST_NAME) is not None


class FileImages:
    """Image files of one size in a folder or in archives, sorted by name."""

    kind = "files"
    manifest = None

    def __init__(self, location: str, archive: Archive, key: str) -> None:
        """Decode the first image. Raises UserError without images, or for files in unsupported formats."""
        self._url, self._archive = location.rstrip("/"), archive
        self.encodings: Counter[str] = Counter()
        """Number of files read, by format and mode, such as "JPEG RGB"."""
        others = [path for path in archive.others if PurePosixPath(path).suffix.lower() not in BESIDE_IMAGES]
        if others:
            more = f" and {len(others) - 1:,} more files" if len(others) > 1 else ""
            raise UserError(
                f"{self._where(others[0])}{more}: not a supported image format; remove or convert it"
            )
        self.count = len(archive.keys)
        if not self.count:
            raise UserError(
                f"{key}: {printable(self._url)} contains no images; name a folder of images, an "
                ".npz file, tars, or a data set"
            )
        splits = {
            kind for path in archive.keys if "/" in path and (kind := split_of_folder(path.split("/")[0]))
        }
        if len(splits) > 1:
            raise UserError(
                f"{key}: {printable(self._url)} holds folders of {' and '.join(sorted(splits))} images; name "
                "one of them"
            )
        height, width = map(int, self._decode(0).shape[1:])
        self.shape = (3, height, width)
        self.encodings.clear()

    def read(self, images: range) -> Tensor:
        """Read consecutive images, uint8 [n, 3, H, W]: gray is repeated, transparency put on white."""
        pixels = np.empty((len(images), *self.shape), np.uint8)
        for row, number in enumerate(images):
            image = self._decode(number)
            if image.shape != self.shape:
                size, first = (f"{shape[2]} x {shape[1]}" for shape in (image.shape, self.shape))
                raise UserError(
                    f"{self._where(self._archive.keys[number])}: {size} pixels, but {first} in "
                    f"{printable(self._archive.keys[0])}; images of one set have one size"
                )
            pixels[row] = image
        return torch.from_numpy(pixels)

    def labels(self) -> NDArray[np.int64] | None:
        """Class of each image from dataset.json or from its folder; None if an image has no class."""
        keys = self._archive.keys
        listed = edm_labels(self._archive, self._url)
        if listed is not None:
            names: Sequence[Any] = [listed.get(key) for key in keys]
        else:
            names = class_folders([ImagePlace(None, "", (), tuple(key.split("/")[:-1])) for key in keys])
        if any(name is None for name in names):
            return None
        return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)

    def facts(self) -> dict[str, Any]:
        """Counts of the formats and modes of the files."""
        return {"files": dict(self.encodings.most_common())}

    def _decode(self, number: int) -> NDArray[np.uint8]:
        where = self._where(self._archive.keys[number])
        try:
            content = self._archive.read(number)
            pixels = decode(content, 0, NATIVE, PixelRules(orientation=True))
        except AmbiguousIntensitiesError as error:
            raise UserError(f"{where}: values are {error}; images have 8 or 16 bits, unsigned") from None
        except ImageDecodingError as error:
            raise UserError(f"{where} cannot be read ({error}); remove or replace it") from None
        self.encodings[_encoding(content)] += 1
        return pixels

    def _where(self, path: str) -> str:
        return f"{printable(self._url)}/{printable(path)}"


def _encoding(content: bytes) -> str:
    """Format and mode of an image file, from its header."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            return f"{image.format} {image.mode}"
    return "npy"


class DatasetImages:
    """A split of a data set in this program's format."""

    def __init__(self, root: str, manifest: Manifest, split: str) -> None:
        """Open a split. Raises UserError if the data set does not have it."""
        manifest.split_shards(split)
        self.kind = f"split {split}"
        self.root, self.split, self.manifest = root, split, manifest
        self.count, self.shape = manifest.splits[split].images, manifest.image_shape
        self._order = fair_order(manifest, split)
        self._reader = ImageReader(root, manifest, split)

    def read(self, images: range) -> Tensor:
        """Read images by position in the fair order of the split."""
        return self._reader.read(self._order[images.start : images.stop])[0]

    def labels(self) -> NDArray[np.int64] | None:
        """Classes, int64 [N], from the manifest's histogram: sorted, not by image. None if it has none."""
        histogram = self.manifest.splits[self.split].class_histogram
        return None if histogram is None else np.repeat(np.arange(len(histogram)), histogram)

    def facts(self) -> dict[str, Any]:
        """Name and version of the data set."""
        manifest = self.manifest
        return {
            "data": manifest.name,
            "data_version": manifest.version,
            "label_order": manifest.label_order,
            "preprocessing": manifest.recipe,
        }


class _NpzSet(NpzImages):
    """An .npz file as an ImageSet."""

    kind = "npz"
    manifest = None

    def facts(self) -> dict[str, Any]:
        """Empty: arrays are not decoded, so there is nothing to record."""
        return {}
