"""Image folders, zips and tars; split and class of each image follow from its folders."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Interpretation
from fm_core.data.sources.annotation_images import ANNOTATION_WORDS, refuse_pairs
from fm_core.data.sources.archive_readers import Archive, ArchiveGroup, FolderArchive
from fm_core.data.sources.base import Classes
from fm_core.data.sources.class_folders import (
    annotated_classes,
    class_folders,
    classes_of,
    describe_classes,
    edm_labels,
    is_label_list,
    numbers_of,
    ordered,
    untrained,
)
from fm_core.data.sources.file_listing import composed, count_endings, endings_text, printable
from fm_core.data.sources.image_collection import (
    FoundImages,
    ImageCollection,
    ImageFileSource,
    image_file_facts,
    pixel_rules,
)
from fm_core.data.sources.split_selection import assign_rows, choose_splits, describe_choice, left_alone
from fm_core.data.sources.split_words import humps_of, is_filler, split_of_folder
from fm_core.data.sources.splits import ImagePlace, describe_folders, place_images
from fm_core.data.sources.tar_archive import open_archive
from fm_core.errors import UserError
from fm_core.storage.store import Store

RECIPE_VERSION = 2
"""2: validation images are shuffled, the class is the first folder below the split, EXIF orientation is
applied."""
ARCHIVE_SUFFIXES = (".zip", ".tar")
OTHER_ARCHIVE_SUFFIXES = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4"),
    *(".7z", ".rar"),
)
_ARCHIVES = (*OTHER_ARCHIVE_SUFFIXES, *ARCHIVE_SUFFIXES)
LABEL_TABLES = (".csv", ".json", ".jsonl", ".mat", ".parquet", ".tsv")
"""Extensions of tables that may contain the classes of images."""
READ = ("train", "val", "test")
SHUFFLED = "all splits shuffled by data.split_seed"


class FolderSource(ImageFileSource):
    """Images in folders or archives. Without a validation split, validation images are chosen at random."""

    def __init__(self, config: DataSection) -> None:
        self._validation_images, self._seed = config.validation_images, config.split_seed
        facts = image_file_facts(
            config, "folder", {"validation_images": config.validation_images}, RECIPE_VERSION
        )
        assert config.source.url
        super().__init__(facts, config.source.resize, pixel_rules(config, True), config.source.url)

    def find(self) -> FoundImages:
        """Find the splits and their classes."""
        archive, wrappers, siblings = open_tree(self._url)
        if not archive.keys:
            there = endings_text(count_endings(archive.others))
            raise UserError(
                f"data.source.url: no images under {self._url}{f' (but {there})' if there else ''}; put them "
                "there as <class>/<name>.png (or .jpg, ...), or as train/<class>/... and val/<class>/..."
            )
        tree = _Tree(archive, place_images(archive.keys), wrappers, self._url, siblings)
        return split_images(tree, self._validation_images, self._seed)


def open_tree(url: str) -> tuple[Archive, set[str], list[str]]:
    """The files at a URL: of a folder, of an archive, or of the archives in a folder.

    Also returns names, in lower case, that a folder with all images may have without being a class, and the
    files next to the archives. Raises UserError for an archive of an unsupported kind.
    """
    url = url.rstrip("/")
    folder, _, name = url.rpartition("/")
    if name.lower().endswith(ARCHIVE_SUFFIXES):
        store = Store.at(folder or ("/" if url.startswith("/") else "."))
        if store.size(name) is not None and not (store.local and (store.local / name).is_dir()):
            return open_archive(store, name), {PurePosixPath(name).stem.lower()}, []
    store = Store.at(url)
    archive = FolderArchive.listed(store)
    names = [path for path in archive.others if path.lower().endswith(ARCHIVE_SUFFIXES)]
    if archive.keys or not names:
        _refuse_packed_split(archive, store.url)
        return archive, set(), []
    siblings = [path for path in archive.others if path not in set(names)]
    if other := next((path for path in siblings if path.lower().endswith(OTHER_ARCHIVE_SUFFIXES)), None):
        raise UserError(
            f"data.source.url: {store.url}/{printable(other)} is not read, only .zip and .tar are; "
            "unpack it to one of these, or remove it"
        )
    stems = {PurePosixPath(path).stem.lower() for path in names}
    return ArchiveGroup([(path, open_archive(store, path)) for path in names]), stems, siblings


def _refuse_packed_split(archive: FolderArchive, url: str) -> None:
    """Raise UserError for folders of splits next to an archive of another split."""
    kinds = {split_of_folder(name) for key in archive.keys for name in key.split("/")[:-1]} - {None}
    for path in archive.others if kinds else ():
        ending = next((end for end in _ARCHIVES if path.lower().endswith(end)), None)
        kind = ending and split_of_folder(path.rpartition("/")[2][: -len(ending)])
        if kind and kind not in kinds:
            raise UserError(
                f"data.source.url: {url}/{printable(path)} is not read next to folders of images; unpack "
                "it, or remove it"
            )


class _Tree:
    """Images with their splits and classes."""

    def __init__(
        self,
        archive: Archive,
        places: Sequence[ImagePlace],
        wrappers: set[str],
        url: str,
        siblings: Sequence[str] = (),
    ) -> None:
        """beside: files next to the archives."""
        self.archive, self.places, self.wrappers, self.url = archive, places, wrappers, url
        self.siblings = siblings
        self.edm = edm_labels(archive, url)

    def rows_of(self, split: str | None) -> NDArray[np.int64]:
        """Indices of the images of a split, int64."""
        return np.flatnonzero([place.split == split for place in self.places])

    def names_of(self, rows: NDArray[np.int64]) -> list[str | None]:
        """Class name of each image of a split; None without one."""
        numbers = rows.tolist()
        keys = [self.archive.keys[int(number)] for number in numbers]
        if self.edm is not None:
            return [None if key not in self.edm else str(self.edm[key]) for key in keys]
        places = _inside_archives([self.places[number] for number in numbers])
        names = [name and composed(_stem(name)) for name in class_folders(places, self.wrappers)]
        if not any(names):
            return annotated_classes(self.archive, places[0].folder, keys) or names
        return names

    def require_all_or_none(self, names: Sequence[str | None]) -> None:
        """Raise UserError if only some of the training images have a class."""
        loose = sum(name is None for name in names)
        if self.edm is not None and loose:
            raise UserError(
                f"{self.url}: dataset.json has no label for {loose} of {len(names)} training images; add "
                "them, or remove the file to take classes from folders"
            )
        if 0 < loose < len(names):
            raise UserError(
                f"data.source.url: {loose} of {len(names)} images are in no class folder under {self.url}; "
                "put all or none in one"
            )

    def unread(self) -> list[str]:
        """Files that are neither images nor label lists."""
        others = [path for path in self.archive.others if not is_label_list(path, self.edm is not None)]
        return [*others, *self.siblings]

    def unread_labels(self) -> list[str]:
        """Note about a table next to images without classes, which may contain them."""
        tables = [path for path in self.unread() if path.lower().endswith(LABEL_TABLES)]
        if not tables:
            return []
        return [f"no classes: {printable(tables[0])} is not read; put the images of a class into its folder"]

    def empty_classes(self, split: str | None, names: set[str]) -> list[str]:
        """Note about empty class folders of the training split; archives do not list them."""
        paths = list(self.archive.others)
        if isinstance(self.archive, FolderArchive):
            paths += self.archive.empty_folders
        tops = {f"{place.folder}/" if place.folder else "" for place in self.places if place.split == split}
        below = {
            composed(path[len(top) :].split("/")[0])
            for top in tops
            for path in paths
            if "/" in path[len(top) :] and path.startswith(top)
        }
        empty = sorted(
            printable(name)
            for name in below - names
            if not (is_filler(name) or split_of_folder(name) or ANNOTATION_WORDS & set(humps_of(name)))
            and not name.lower().endswith(ARCHIVE_SUFFIXES)
        )
        return [f"no images in class folder {', '.join(empty[:5])}"] if empty and self.edm is None else []

    def describe(self, split: str | None) -> str:
        """Folders of a split and their numbers of images."""
        return describe_folders(self.places, split)


def _inside_archives(places: Sequence[ImagePlace]) -> Sequence[ImagePlace]:
    """Places inside of archives; if several archives have images without folders, each is a class."""
    inside: dict[ImagePlace, ImagePlace] = {}
    archives: set[tuple[str, ...]] = set()
    for place in dict.fromkeys(places):
        depths = [depth for depth, name in enumerate(place.below) if name.lower().endswith(ARCHIVE_SUFFIXES)]
        if not depths:
            return places
        archives.add(place.below[: depths[0] + 1])
        inside[place] = replace(place, below=place.below[depths[0] + 1 :])
    if len(archives) > 1 and not any(place.below for place in inside.values()):
        inside = {place: replace(place, below=place.below[-1:]) for place in inside}
    return [inside[place] for place in places]


def _stem(name: str) -> str:
    return name[:-4] if name.lower().endswith(ARCHIVE_SUFFIXES) else name


def split_images(tree: _Tree, validation_images: int, seed: int) -> FoundImages:
    """Training and validation images of a tree, with a description of the splits.

    Raises UserError without training images, or for validation images of unknown classes.
    """
    left = sorted({place.split for place in tree.places if place.split not in (*READ, None)}, key=str)
    rows: dict[str | None, NDArray[np.int64]] = {
        split: numbers for split in (*READ, None, *left) if len(numbers := tree.rows_of(split))
    }
    names = {split: tree.names_of(rows[split]) for split in (*READ, None) if split in rows}
    training = names.get("train", names.get(None, []))
    tree.require_all_or_none(training)
    if tree.edm is None and training:
        rows_of_training = rows["train" if "train" in rows else None]
        refuse_pairs([tree.archive.keys[int(row)] for row in rows_of_training.tolist()], training)
    labeled = bool(training) and training[0] is not None

    def usable(split: str) -> bool:
        known = None not in names[split] and bool(set(names[split]) & set(training))
        if labeled and not known and split == "val":
            raise UserError(_unknown_classes(names[split], tree.url))
        return known or not labeled

    choice = choose_splits(list(rows), tree.url, usable)
    used = (
        {name for split in choice.used for name in names[split] if name is not None}
        if labeled
        else set[str]()
    )
    classes, in_order = _classes(tree, used)
    labels = None
    if labeled:
        labels = np.full(len(tree.places), -1, np.int64)
        for split in choice.used:
            labels[rows[split]] = numbers_of(names[split], in_order)
    selected = assign_rows(choice, rows, validation_images, seed)
    how = "dataset.json" if tree.edm is not None else "the first folder below the split"
    trained = Counter(map(str, training)) if labeled else {}
    return FoundImages(
        {split: ImageCollection(tree.archive, labels, numbers) for split, numbers in selected.items()},
        classes,
        Interpretation(
            splits=describe_choice(choice, tree.describe, validation_images),
            classes=describe_classes(classes) + (f" (by {how})" if labeled else ""),
            order=SHUFFLED,
            own_validation=choice.own_validation,
            fair_order=True,
            not_read=count_endings(tree.unread()),
            remarks=(
                *left_alone(choice, tree.describe),
                *untrained(trained, in_order),
                *(tree.empty_classes(choice.train, set(in_order)) if labeled else tree.unread_labels()),
            ),
        ),
    )


def _classes(tree: _Tree, names: set[str]) -> tuple[Classes, list[str]]:
    """The classes, and their names in order; those of dataset.json are already numbers."""
    if tree.edm is None or not names:
        return classes_of(names), ordered(names)
    count = max(map(int, names)) + 1
    return Classes(count, "edm-dataset-json"), [str(number) for number in range(count)]


def _unknown_classes(names: Sequence[str | None], url: str) -> str:
    loose = sum(name is None for name in names)
    known = sorted({printable(name) for name in names if name is not None})[:3]
    what = f"{loose:,} validation images are in no class folder"
    if not loose:
        what = f"no training images of any class of the validation images ({', '.join(known)})"
    return (
        f"data.source.url: {what} under {url}; put them in the class folders of the training images, or "
        "remove them to choose validation images at random"
    )
