"""Ambiguous splits: several folders of one split, or split names in an unsupported layout."""

import re
from collections.abc import Iterable, Mapping, Sequence

from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.split_words import (
    KINDS,
    is_bare,
    split_and_rest,
    split_of_data_file,
    split_of_folder,
    variant_of_data_file,
)
from fm_core.errors import UserError

_SPLIT_WORD = re.compile("|".join(KINDS), re.IGNORECASE)
_KINDS_HELD_OUT = {"val", "test"}
VARIANTS = frozenset(
    [
        *("a", "b", "aligned", "augmented", "balanced", "blur", "clean", "cleaned", "cropped", "extra"),
        *(
            "filtered",
            "hr",
            "large",
            "lr",
            "noisy",
            "original",
            "resized",
            "sharp",
            "small",
            "subset",
            "tiny",
        ),
    ]
)
"""Words that distinguish variants of one training set, and are unlikely in class names."""


class ImageFolder:
    """A folder of a tree of images."""

    def __init__(self) -> None:
        self.folders: dict[str, ImageFolder] = {}
        self.files = 0
        self.splits: dict[str, str] = {}
        """Split of each folder that is one: train, val or test, or the name of an ignored one."""


def one_folder_for_each(splits: Mapping[str, str], path: str) -> dict[str, str]:
    """Splits of sibling folders; of several folders for one split, the intended ones are kept.

    Numbered folders (train_1, train_2) belong together. Otherwise the one with the plain name is used, and
    the others get their own names as splits. UserError without a plain name.
    """
    chosen = dict(splits)
    for kind in set(splits.values()):
        names = sorted(name for name, of in splits.items() if of == kind)
        unused = kind == "test" and "val" in splits.values()
        if len(names) == 1 or _are_parts(names) or unused:
            continue
        bare = [name for name in names if is_bare(name)]
        if len(bare) != 1:
            raise _several(kind, path + names[0], path + names[1])
        chosen |= {name: name for name in names if name != bare[0]}
    return chosen


def _are_parts(names: Sequence[str]) -> bool:
    """Whether names differ only in a number, which enumerates the parts of a set."""
    stems = {re.sub(r"[\W_]*\d*(\.(tar|zip))?$", "", name.lower()) for name in names}
    numbers = [int(match[1]) for name in names if (match := re.search(r"(\d+)(?:\.\w+)?$", name))]
    counted = len(set(numbers)) == len(numbers) and max(numbers, default=0) <= 2 * len(names)
    return len(stems) == 1 and len(numbers) >= len(names) - 1 and counted


def splits_of_data_files(paths: Sequence[str], url: str) -> dict[str, str | None]:
    """Split of each data file: train, val or test, None, or the name of an ignored variant.

    train-0.parquet is preferred to train_clean-0.parquet, and train/ to extra/train/. UserError if it is
    ambiguous, as for the folders of several configurations of the hub.
    """
    splits = {path: split_of_data_file(path) for path in paths}
    kinds = {kind for kind in splits.values() if kind is not None}
    for kind in kinds - ({"test"} if "val" in kinds else set[str]()):
        folders: dict[str, dict[tuple[str, ...], list[str]]] = {}
        for path in (path for path in paths if splits[path] == kind):
            folder, words = variant_of_data_file(path)
            folders.setdefault(folder, {}).setdefault(words, []).append(path)
        if len(folders) > 1 and not _are_parts(sorted(folders)):
            if "" not in folders:
                raise UserError(
                    f"data.source.url: {' and '.join(map(printable, sorted(folders)[:2]))} under {url} both "
                    f"hold {kind} files; add one of these folders to the URL"
                )
            for folder in folders.keys() - {""}:
                left = [path for files in folders[folder].values() for path in files]
                splits |= dict.fromkeys(left, f"{folder}/{kind}")
            folders = {"": folders[""]}
        for variants in folders.values():
            splits |= _other_variants(variants, kind)
    return splits


def _other_variants(variants: Mapping[tuple[str, ...], Sequence[str]], kind: str) -> dict[str, str]:
    """Ignored files of one folder, and their names as splits; UserError if it is ambiguous."""
    if len(variants) == 1:
        return {}
    if () not in variants:
        both = " and ".join(printable(files[0]) for files in list(variants.values())[:2])
        raise UserError(
            f"data.source.url: {both} are both {kind} files; keep only one of them there, or give files that "
            f"belong together one name, as in {kind}-0 and {kind}-1"
        )
    return {path: " ".join((kind, *words)) for words, files in variants.items() if words for path in files}


def refuse_pooled(folder: ImageFolder, path: str = "") -> None:
    """Raise UserError for folders that look like splits if all images would become training images."""
    if not folder.splits:
        pair = _pooled_pair(folder.folders)
        if pair is None and len(folder.folders) == 2:
            kinds = {split_and_rest(name)[0]: name for name in folder.folders}
            if (
                "train" in kinds
                and len(kinds.keys() & _KINDS_HELD_OUT) == 1
                and any(map(split_of_folder, kinds.values()))
            ):
                pair = kinds.pop("train"), next(iter(kinds.values()))
        if pair is not None:
            raise _unplaced(*(path + name for name in pair))
        _refuse_variants(list(folder.folders), path)
    elif "train" not in folder.splits.values():
        others = [name for name in folder.folders if name not in folder.splits]
        if others and all(split_and_rest(name)[0] == "train" for name in others):
            raise _unplaced(path + others[0], path + next(iter(folder.splits)))
    for name, below in folder.folders.items():
        if folder.splits.get(name, "train") == "train" and (name in folder.splits or not folder.splits):
            refuse_pooled(below, f"{path}{name}/")


def _refuse_variants(names: Sequence[str], path: str) -> None:
    """Raise UserError if all folders are variants of a training set, e.g. train and train_clean."""
    splits = [split_and_rest(name) for name in names]
    variants = [rest for kind, rest in splits if kind == "train" and set(rest) <= VARIANTS]
    if len(names) > 1 and len(variants) == len(names) and any(variants):
        raise _several("train", *(path + name for name in sorted(names)[:2]))


def refuse_pooled_files(paths: Sequence[str]) -> None:
    """Raise UserError for image names that look like splits if all would become training images."""
    names: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        names.setdefault(folder, []).append(name.rpartition(".")[0])
    for folder, stems in names.items():
        if pair := _pooled_pair(stems):
            raise _unplaced(*(f"{folder}/{name}".lstrip("/") for name in pair))


def _pooled_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """A name of training images and one of validation or test images that differ only in the split word."""
    pairs: dict[tuple[str, ...], dict[bool, str]] = {}
    for name in filter(_SPLIT_WORD.search, names):
        kind, rest = split_and_rest(name)
        if kind:
            pair = pairs.setdefault(rest, {})
            pair.setdefault(kind == "train", name)
            if len(pair) == 2:
                return pair[True], pair[False]
    return None


def _unplaced(training: str, held_out: str) -> UserError:
    return UserError(
        f"data.source.url: {printable(training)} and {printable(held_out)} look like training and test "
        "images, but are not laid out as splits: put them into folders train and test with no other "
        "folder beside them, or give them names without such words"
    )


def _several(kind: str, first: str, second: str) -> UserError:
    return UserError(
        f"data.source.url: {printable(first)} and {printable(second)} are both {kind} images; leave one of "
        f"them there, or name what belongs together {kind}_1 and {kind}_2"
    )
