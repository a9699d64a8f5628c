"""Splits: the words that name them, which files belong to which, and permutations that never change."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fm_core.data.sources.file_listing import printable
from fm_core.errors import UserError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
"""Words for each split, in any case; "set" may follow, as in testset."""
FILLERS = frozenset(
    [
        *("blurred", "data", "dataset", "files", "full", "ilsvrc", "image", "images", "img", "imgs", "jpeg"),
        *(
            "jpg",
            "partial",
            "photos",
            "pictures",
            "png",
            "px",
            "raw",
            "sample",
            "samples",
            "set",
            "split",
            "x",
        ),
    ]
)
"""Words that say nothing: beside a split word in a folder's name, or as the name of a folder of images."""
_KINDS = {
    word + suffix: kind for kind, words in SPLIT_WORDS.items() for word in words for suffix in ("", "set")
}
_ARCHIVE = re.compile(r"\.(tar|zip)$", re.IGNORECASE)


_SPLIT_WORD = re.compile("|".join(_KINDS), re.IGNORECASE)
_KINDS_HELD_OUT = {"val", "test"}


def words_of(name: str) -> list[str]:
    """The words in a name, in lower case: runs of letters."""
    return re.findall(r"[^\W\d_]+", name.lower())


def split_of_folder(name: str) -> str | None:
    """train, val or test for a folder or archive named after a split, e.g. "Validation" or "train_64x64"."""
    words = words_of(_ARCHIVE.sub("", name))
    kinds = {_KINDS[word] for word in words if word in _KINDS}
    rest = [word for word in words if word not in _KINDS and word not in FILLERS]
    return kinds.pop() if len(kinds) == 1 and not rest else None


def split_of_data_file(path: str) -> str | None:
    """train, val or test by the first split word in the name of a data file or the nearest folder."""
    for name in reversed(path.split("/")):
        kind = next((_KINDS[word] for word in words_of(name) if word in _KINDS), None)
        if kind:
            return kind
    return None


def is_filler(name: str) -> bool:
    """Whether a folder's name says nothing about its images, e.g. "images"."""
    words = words_of(_ARCHIVE.sub("", name))
    return bool(words) and all(word in FILLERS for word in words)


@dataclass(frozen=True)
class ImagePlace:
    """Where an image is: its split, and the folders around the folder of that split."""

    split: str | None
    """train, val or test; None outside of the splits' folders."""
    folder: str
    """The folder of the split, relative to the source; "" without one."""
    above: tuple[str, ...]
    """Folders from the top to that of the split."""
    below: tuple[str, ...]
    """Folders from that of the split, or from the top, to the image."""


class _Folder:
    """A folder of a tree of images."""

    def __init__(self) -> None:
        self.folders: dict[str, _Folder] = {}
        self.files = 0
        self.splits: dict[str, str] = {}
        """Split of each folder that is one; set by `_find_splits`."""


def place_images(paths: Sequence[str]) -> list[ImagePlace]:
    """The place of each image, from the folders or else the file names of all.

    A folder named after a split counts as one at the top, below folders that hold nothing else, or where all
    images lie in such folders. A folder "train" beside others, without validation or test, is a class.
    Raises UserError for names of training and of test images that are placed in neither.
    """
    top = _Folder()
    for path in paths:
        folder = top
        for name in path.split("/")[:-1]:
            folder = folder.folders.setdefault(name, _Folder())
        folder.files += 1
    if not _find_splits(top):
        _unmark(top)
        _refuse_pooled(top, "")
        places = _place_by_file_names(paths)
        if places[0].split is None:
            _refuse_pooled_files(paths)
        return places
    _refuse_pooled(top, "")
    by_folder: dict[str, ImagePlace] = {}  # one object for all images of a folder
    places = []
    for path in paths:
        name = path.rpartition("/")[0]
        if name not in by_folder:
            by_folder[name] = _place_folder(top, name.split("/") if name else [])
        places.append(by_folder[name])
    return places


def _place_folder(top: _Folder, names: list[str]) -> ImagePlace:
    folder = top
    for depth, name in enumerate(names):
        if name in folder.splits:
            above, below = tuple(names[:depth]), tuple(names[depth + 1 :])
            return ImagePlace(folder.splits[name], "/".join(names[: depth + 1]), above, below)
        folder = folder.folders[name]
    return ImagePlace(None, "", (), tuple(names))


def _find_splits(folder: _Folder) -> bool:
    """Mark the folders of splits in a tree; false if there are none."""
    splits = {name: kind for name in folder.folders if (kind := split_of_folder(name))}
    kinds = set(splits.values())
    alone = not folder.files and len(splits) == len(folder.folders)
    if kinds == {"train"} and not alone:
        splits = {}  # a class of pictures of trains
    if splits:
        folder.splits = splits
        return True
    if folder.files or not folder.folders:
        return False
    found = [_find_splits(below) for below in folder.folders.values()]  # all are marked
    if all(found):
        return all(len(below.splits) == len(below.folders) and not below.files for below in _marked(folder))
    return False


def _marked(folder: _Folder) -> list[_Folder]:
    """Folders below with marked splits; one that holds everything may have others beside its splits."""
    if len(folder.folders) == 1:
        below = next(iter(folder.folders.values()))
        return [] if below.splits else _marked(below)
    return [
        marked
        for below in folder.folders.values()
        for marked in ([below] if below.splits else _marked(below))
    ]


def _unmark(folder: _Folder) -> None:
    folder.splits = {}
    for below in folder.folders.values():
        _unmark(below)


def _split_and_rest(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The only split word anywhere in a name, e.g. in trainA, and the other words."""
    words = words_of(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", _ARCHIVE.sub("", name)))
    kinds = {_KINDS[word] for word in words if word in _KINDS}
    rest = tuple(word for word in words if word not in _KINDS and word not in FILLERS)
    return (kinds.pop() if len(kinds) == 1 else None), rest


def _pooled_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """A name of training images and one of validation or test images that differ in the split word only."""
    found: dict[tuple[str, ...], dict[bool, str]] = {}
    for name in filter(_SPLIT_WORD.search, names):
        kind, rest = _split_and_rest(name)
        if kind:
            pair = found.setdefault(rest, {})
            pair.setdefault(kind == "train", name)
            if len(pair) == 2:
                return pair[True], pair[False]
    return None


def _refuse_pooled(folder: _Folder, path: str) -> None:
    """Raise UserError for folders that look like splits, where all would become training images."""
    if not folder.splits:
        pair = _pooled_pair(folder.folders)
        if pair is None and len(folder.folders) == 2:
            kinds = {_split_and_rest(name)[0]: name for name in folder.folders}
            if (
                "train" in kinds
                and len(kinds.keys() & _KINDS_HELD_OUT) == 1
                and any(map(split_of_folder, kinds.values()))
            ):
                pair = kinds.pop("train"), next(iter(kinds.values()))
        if pair is not None:
            raise _unplaced(*(path + name for name in pair))
    for name, below in folder.folders.items():
        if folder.splits.get(name, "train") == "train" and (name in folder.splits or not folder.splits):
            _refuse_pooled(below, f"{path}{name}/")


def _refuse_pooled_files(paths: Sequence[str]) -> None:
    names: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        names.setdefault(folder, []).append(name.rpartition(".")[0])
    for folder, stems in names.items():
        if pair := _pooled_pair(stems):
            raise _unplaced(*(f"{folder}/{name}".lstrip("/") for name in pair))


def _unplaced(training: str, held_out: str) -> UserError:
    return UserError(
        f"data.source.url: {printable(training)} and {printable(held_out)} look like training and test "
        "images, but are not laid out as splits: put them into folders train and test with no other "
        "folder beside them, or give them names without such words"
    )


def _place_by_file_names(paths: Sequence[str]) -> list[ImagePlace]:
    """Places by names such as train_0001.png, if all are so named and some are for training, some are not."""
    kinds = [_KINDS.get(next(iter(words_of(path.rsplit("/", 1)[-1])), "")) for path in paths]
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
    """The folders of a split in a few words, e.g. "Training/ (1,200 images)"."""
    counts = Counter(place.folder or "." for place in places if place.split == split)
    names = sorted(counts)
    shown = ", ".join(f"{printable(name)} ({counts[name]:,} images)" for name in names[:3])
    return shown + (f" and {len(names) - 3:,} more folders" if len(names) > 3 else "")


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count - 1, int64 [count].

    Computed from the generator's raw bits, as numpy's permutation may change between versions.
    """
    keys = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def split_validation(count: int, validation: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training images and of `validation` validation images, each ascending, int64."""
    shuffled = permutation(count, seed)
    return np.sort(shuffled[validation:]), np.sort(shuffled[:validation])
