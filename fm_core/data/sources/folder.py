"""Image folders with a subfolder per class: <url>/<class>/<image> or <url>/{train,val}/<class>/<image>."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.sources.archive_readers import FolderArchive, is_image_file
from fm_core.data.sources.base import UNLABELED, Classes
from fm_core.data.sources.file_listing import list_names
from fm_core.data.sources.image_collection import (
    ImageCollection,
    ImageFileSource,
    folder_labels,
    image_file_facts,
    in_order,
    shuffled,
)
from fm_core.data.sources.splits import permutation, split_validation
from fm_core.errors import UserError
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store

DEPTH = 4
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}


class FolderSource(ImageFileSource):
    """Images in folders. Without folders train and val, validation images are chosen at random."""

    def __init__(self, config: DataSection) -> None:
        self._validation_images, self._seed = config.validation_images, config.split_seed
        extra = {"validation_images": config.validation_images}
        super().__init__(image_file_facts(config, "folder", extra), config.source.resize)
        assert config.source.url
        self._store = Store.at(config.source.url)

    def find(self) -> tuple[dict[str, ImageCollection], Classes]:
        """Find both splits. Classes are the sorted names of the folders that hold images."""
        keys = [key for key in list_names(self._store, DEPTH) if is_image_file(key)]
        if not keys:
            raise UserError(
                f"data.source.url: no images under {self._store.url}; put them there as <class>/<name>.png "
                "(or .jpg, ...), or as train/<class>/... and val/<class>/..."
            )
        tops = {key.split("/")[0] for key in keys}
        train, val = (
            next((name for name in names if name in tops), None) for names in SPLIT_FOLDERS.values()
        )
        if train and val:
            archives = [
                FolderArchive(self._store, [key for key in keys if key.startswith(top + "/")])
                for top in (train, val)
            ]
            classes = classes_of([key for archive in archives for key in archive.keys], depth=2)
            labels = [self._labels(archive, classes) for archive in archives]
            return {
                "train": shuffled(archives[0], labels[0], self._seed),
                "val": in_order(archives[1], labels[1]),
            }, classes
        return self._split_validation(FolderArchive(self._store, keys))

    def _split_validation(self, archive: FolderArchive) -> tuple[dict[str, ImageCollection], Classes]:
        count = len(archive.keys)
        if self._validation_images >= count:
            raise UserError(
                f"data.validation_images: {self._validation_images} leaves nothing to train on of {count} "
                "images"
            )
        classes = classes_of(archive.keys, depth=1)
        labels = self._labels(archive, classes)
        train, val = split_validation(count, self._validation_images, self._seed)
        order = train[permutation(len(train), self._seed)]
        return {
            "train": ImageCollection(archive, labels, order),
            "val": ImageCollection(archive, labels, val),
        }, classes

    def _labels(self, archive: FolderArchive, classes: Classes) -> NDArray[np.int64] | None:
        return None if classes.names is None else folder_labels(archive.keys, classes.names)


def classes_of(keys: Sequence[str], depth: int) -> Classes:
    """Classes by the sorted names of the folders of the images; no labels without folders.

    Raises UserError if some images are in class folders and some are not.
    """
    names = tuple(sorted({key.split("/")[-2] for key in keys if key.count("/") >= depth}))
    loose = sum(key.count("/") < depth for key in keys)
    if not names:
        return UNLABELED
    if loose:
        raise UserError(
            f"data.source.url: {loose} of {len(keys)} images are in no class folder; put all or none in one"
        )
    digest = sha256_bytes("\n".join(names).encode())[:8]
    return Classes(len(names), f"sorted-folder-names-{digest}", names)
