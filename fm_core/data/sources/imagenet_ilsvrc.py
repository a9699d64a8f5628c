"""Original images of ILSVRC2012, in class folders or in the tars of image-net.org.

Labels are positions in the sorted WordNet ids (tench = 0). The validation images are in class folders, or in
one folder together with a file of their classes.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Interpretation
from fm_core.data.sources.archive_readers import Archive, FolderArchive
from fm_core.data.sources.base import Classes
from fm_core.data.sources.class_folders import describe_classes
from fm_core.data.sources.file_listing import count_endings
from fm_core.data.sources.image_collection import (
    FoundImages,
    ImageFileSource,
    folder_labels,
    image_file_facts,
    in_order,
    pixel_rules,
    require_counts,
    shuffled,
)
from fm_core.data.sources.imagenet_val_labels import LABEL_FILES, validation_classes
from fm_core.data.sources.tar_archive import TarArchive
from fm_core.errors import UserError
from fm_core.storage.store import Store

PUBLISHED = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
ORDER_BY_NUMBER = "train shuffled by data.split_seed, val by number"
FOLDERS = ("{split}", "ILSVRC/Data/CLS-LOC/{split}", "ILSVRC2012_img_{split}", "{split}_blurred")


class ImagenetOriginalSource(ImageFileSource):
    """Source for the formats imagenet-folder and imagenet-tar."""

    def __init__(self, config: DataSection, kind: str, val_by_number: bool = False) -> None:
        """val_by_number: keep validation images in class folders in path order."""
        partial = config.source.allow_partial
        facts = image_file_facts(config, kind, {"allow_partial": partial})
        published = None if partial else sum(PUBLISHED.values())
        assert config.source.url
        super().__init__(
            replace(facts, images=published),
            config.source.resize,
            pixel_rules(config, orientation=False),
            config.source.url,
        )
        self._store = Store.at(config.source.url)
        self._val_by_number = val_by_number
        self._kind, self._partial, self._seed = kind, partial, config.split_seed

    def find(self) -> FoundImages:
        """Find both splits and their classes, and check the numbers of images."""
        train, val = self._archive("train"), self._archive("val")
        names = tuple(sorted({key.split("/")[-2] for key in train.keys if "/" in key}))
        if len(names) != CLASSES and not self._partial:
            raise UserError(
                f"data.source.url: {self._store.url} holds {len(names)} training classes, "
                f"ILSVRC2012 {CLASSES}; set data.source.allow_partial to accept it"
            )
        labels = folder_labels(train.keys, names)
        if labels.size and labels.min() < 0:
            stray = train.keys[int(labels.argmin())]
            raise UserError(f"data.source.url: {stray} is in no class folder under {self._store.url}")
        validation = self._validation_labels(val, names)
        # Images are numbered in a random order, but class folders are sorted.
        in_folders = bool(val.keys) and folder_labels(val.keys, names).min() >= 0
        shuffle = in_folders and not self._val_by_number
        collections = {
            "train": shuffled(train, labels, self._seed),
            "val": shuffled(val, validation, self._seed) if shuffle else in_order(val, validation),
        }
        require_counts(self._store.url, collections, PUBLISHED, self._partial)
        order = "sorted-wnid" if len(names) == CLASSES else f"sorted-wnid-of-{len(names)}"
        classes = Classes(len(names), order, names)
        return FoundImages(
            collections,
            classes,
            Interpretation(
                splits=f"train and val of ILSVRC2012 ({len(train.keys):,} and {len(val.keys):,} images)",
                classes=f"{describe_classes(classes)} (WordNet ids, sorted)",
                order="all splits shuffled by data.split_seed" if shuffle else ORDER_BY_NUMBER,
                own_validation=True,
                fair_order=shuffle or not (in_folders or self._partial),
                not_read=count_endings([*train.others, *val.others]),
            ),
        )

    def _archive(self, split: str) -> Archive:
        if self._kind == "imagenet-tar":
            if self._store.size(TARS[split]) is None:
                raise UserError(
                    f"data.source.url: no {TARS[split]} under {self._store.url}; download both tars and "
                    "ILSVRC2012_devkit_t12.tar.gz from image-net.org (login needed) and put them there"
                )
            tar = TarArchive(self._store, TARS[split], nested=split == "train")
            if not tar.keys:
                raise UserError(f"data.source.url: no images in {self._store.url}/{TARS[split]}")
            return tar
        for template in FOLDERS:
            folder = template.format(split=split)
            archive = FolderArchive.listed(self._store, depth=2, below=folder)
            if archive.keys:
                return archive
        raise UserError(
            f"data.source.url: no images under {self._store.url}/{split}; put the training images there as "
            "train/<wnid>/*.JPEG, the validation images as val/<wnid>/*.JPEG, or as val/*.JPEG and "
            f"{LABEL_FILES}"
        )

    def _validation_labels(self, val: Archive, names: tuple[str, ...]) -> NDArray[np.int64]:
        labels = folder_labels(val.keys, names)
        if labels.min() < 0:
            labels = self._labels_from_file(val, names)
        if labels.min() < 0:
            raise UserError(
                f"data.source.url: {val.keys[int(labels.argmin())]} is of a class without training images"
            )
        return labels

    def _labels_from_file(self, val: Archive, names: tuple[str, ...]) -> NDArray[np.int64]:
        stems = [key.split("/")[-1].rsplit(".", 1)[0] for key in val.keys]
        classes = validation_classes(self._store, stems)
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers.get(classes.get(stem, ""), -1) for stem in stems], np.int64)
