"""Splits: assignment of images by their paths, and stable permutations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fm_core.data.sources.annotation_images import LEFT_ALONE, annotation_images
from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.split_conflicts import (
    ImageFolder,
    one_folder_for_each,
    refuse_pooled,
    refuse_pooled_files,
)
from fm_core.data.sources.split_words import KINDS, split_of_folder, words_of


@dataclass(frozen=True)
class ImagePlace:
    """Location of an image: its split, and the folders above and below the folder of that split."""

    split: str | None
    """train, val or test; None outside of their folders; any other name for ignored images."""
    folder: str
    """The folder of the split, relative to the source; "" without one."""
    above: tuple[str, ...]
    """Folders from the top to that of the split."""
    below: tuple[str, ...]
    """Folders from that of the split, or from the top, to the image."""


def place_images(paths: Sequence[str]) -> list[ImagePlace]:
    """The place of each image, determined from all folder names or else all file names.

    A folder named after a split counts as one at the top level, below folders that contain nothing else, or
    if all images are in such folders. A folder "train" next to others, without validation or test, is a
    class. Masks and other annotation images are in the split LEFT_ALONE. Raises UserError for names of
    training and test images that are assigned to neither, and for several ambiguous folders of one split.
    """
    described = annotation_images(paths)
    placed = iter(_place([path for path in paths if path not in described] if described else paths))
    folders: dict[str, ImagePlace] = {}
    return [
        folders.setdefault(folder := path.rpartition("/")[0], ImagePlace(LEFT_ALONE, folder, (), ()))
        if path in described
        else next(placed)
        for path in paths
    ]


def _place(paths: Sequence[str]) -> list[ImagePlace]:
    top = ImageFolder()
    for path in paths:
        folder = top
        for name in path.split("/")[:-1]:
            folder = folder.folders.setdefault(name, ImageFolder())
        folder.files += 1
    if not _find_splits(top):
        _unmark(top)
        refuse_pooled(top)
        places = _place_by_file_names(paths)
        if places[0].split is None:
            refuse_pooled_files(paths)
        return places
    _choose_splits(top)
    refuse_pooled(top)
    by_folder: dict[str, ImagePlace] = {}  # one object shared by all images of a folder
    places = []
    for path in paths:
        name = path.rpartition("/")[0]
        if name not in by_folder:
            by_folder[name] = _place_folder(top, name.split("/") if name else [])
        places.append(by_folder[name])
    return places


def _place_folder(top: ImageFolder, names: list[str]) -> ImagePlace:
    folder = top
    for depth, name in enumerate(names):
        if name in folder.splits:
            above, below = tuple(names[:depth]), tuple(names[depth + 1 :])
            return ImagePlace(folder.splits[name], "/".join(names[: depth + 1]), above, below)
        folder = folder.folders[name]
    return ImagePlace(None, "", (), tuple(names))


def _find_splits(folder: ImageFolder) -> bool:
    """Mark the folders of splits in a tree; false if there are none."""
    splits = {name: kind for name in folder.folders if (kind := split_of_folder(name))}
    kinds = set(splits.values())
    alone = not folder.files and len(splits) == len(folder.folders)
    if kinds == {"train"} and not alone:
        splits = {}  # a class of images of trains
    if splits:
        folder.splits = splits
        return True
    if folder.files or not folder.folders:
        return False
    marked = [_find_splits(below) for below in folder.folders.values()]  # all are marked
    if all(marked):
        return all(len(below.splits) == len(below.folders) and not below.files for below in _marked(folder))
    return False


def _marked(folder: ImageFolder) -> list[ImageFolder]:
    """Folders below with marked splits; one that contains everything may have others next to its splits."""
    if len(folder.folders) == 1:
        below = next(iter(folder.folders.values()))
        return [] if below.splits else _marked(below)
    return [
        marked
        for below in folder.folders.values()
        for marked in ([below] if below.splits else _marked(below))
    ]


def _choose_splits(folder: ImageFolder, path: str = "") -> None:
    """Of several sibling folders of one split, keep the intended ones."""
    folder.splits = one_folder_for_each(folder.splits, path)
    for name, below in folder.folders.items():
        _choose_splits(below, f"{path}{name}/")


def _unmark(folder: ImageFolder) -> None:
    folder.splits = {}
    for below in folder.folders.values():
        _unmark(below)


def _place_by_file_names(paths: Sequence[str]) -> list[ImagePlace]:
    """Places by names such as train_0001.png, if all are named like that, for training and other splits."""
    kinds = [KINDS.get(next(iter(words_of(path.rsplit("/", 1)[-1])), "")) for path in paths]
    if None in kinds or "train" not in kinds or len(set(kinds)) == 1:
        kinds = [None] * len(paths)
    places: dict[tuple[str | None, str], ImagePlace] = {}
    for kind, path in zip(kinds, paths, strict=True):
        folder = path.rpartition("/")[0]
        if (kind, folder) not in places:
            below = tuple(folder.split("/")) if folder else ()
            places[kind, folder] = ImagePlace(kind, f"files named {kind}" if kind else "", (), below)
    return [places[kind, path.rpartition("/")[0]] for kind, path in zip(kinds, paths, strict=True)]


def describe_folders(places: Sequence[ImagePlace], split: str | None) -> str:
    """Short description of the folders of a split, e.g. "Training/ (1,200 images)"."""
    outside = split is None and any(place.split is not None for place in places)
    counts = Counter(
        place.folder or (place.below[0] if outside and place.below else ".")
        for place in places
        if place.split == split
    )
    names = sorted(counts)
    shown = ", ".join(f"{printable(name)} ({counts[name]:,} images)" for name in names[:3])
    return shown + (f" and {len(names) - 3:,} more folders" if len(names) > 3 else "")


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count - 1, int64 [count].

    Computed from the generator's raw bits, because numpy's permutation may change between versions.
    """
    keys = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def split_validation(count: int, validation: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training images and of `validation` validation images, each ascending, int64."""
    shuffled = permutation(count, seed)
    return np.sort(shuffled[validation:]), np.sort(shuffled[:validation])
