"""Classes of image files, from their folders or from label lists next to them."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fm_core.data.sources.archive_readers import Archive
from fm_core.data.sources.base import UNLABELED, Classes
from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.split_words import is_filler, split_of_folder
from fm_core.data.sources.splits import ImagePlace
from fm_core.errors import UserError
from fm_core.storage.hashing import sha256_bytes

EDM_LABELS = "dataset.json"
"""Label list of EDM and StyleGAN, next to the images."""
ANNOTATIONS = "val_annotations.txt"
"""Class list of tiny-imagenet's validation images: name, class and a bounding box in each line."""


def class_folders(places: Sequence[ImagePlace], wrappers: Collection[str] = ()) -> list[str | None]:
    """Name of the class of each image of a split: its first folder below the split; None without one.

    A folder that contains all images is not a class if its name is generic, such as "images", repeats the
    split, is in `wrappers` (lower case), or if it contains several folders and there are no splits.
    """
    distinct = list(dict.fromkeys(places))
    depth = 0
    while distinct and all(len(place.below) > depth for place in distinct):
        names = {place.below[depth] for place in distinct}
        name = min(names)
        repeated = split_of_folder(name) is not None and split_of_folder(name) == distinct[0].split
        if len(names) > 1:
            break
        if not (is_filler(name) or repeated or name.lower() in wrappers or _holds_classes(distinct, depth)):
            break
        depth += 1
    above = {place.above[-1] for place in distinct if place.above}
    classes: dict[ImagePlace, str | None] = {}
    for place in distinct:
        if len(place.below) > depth:
            classes[place] = place.below[depth]
        else:  # <class>/<split>/<image>, if there are several classes
            classes[place] = place.above[-1] if len(above) > 1 and place.above else None
    return [classes[place] for place in places]


def _holds_classes(places: Sequence[ImagePlace], depth: int) -> bool:
    """Whether the folder that contains everything, without splits, contains only several folders."""
    if any(place.split is not None for place in places):
        return False
    while all(len(place.below) > depth + 1 for place in places):
        depth += 1
        if len({place.below[depth] for place in places}) > 1:
            return True
    return False


def ordered(names: Collection[str]) -> list[str]:
    """Names in class order: by value if all are integers, otherwise by code points."""
    if names and all(re.fullmatch(r"[+-]?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def classes_of(names: Collection[str]) -> Classes:
    """The classes of a set of folder names."""
    if not names:
        return UNLABELED
    in_order = ordered(names)
    shown = tuple(printable(name) for name in in_order)
    kind = "sorted" if in_order == sorted(names) else "numbered"
    digest = sha256_bytes("\n".join(shown).encode())[:8]
    return Classes(len(shown), f"{kind}-folder-names-{digest}", shown)


def numbers_of(names: Sequence[str | None], in_order: Sequence[str]) -> NDArray[np.int64]:
    """Class of each name, int64; -1 for None."""
    numbers = {name: number for number, name in enumerate(in_order)}
    return np.array([-1 if name is None else numbers[name] for name in names], np.int64)


def edm_labels(archive: Archive, url: str) -> dict[str, int] | None:
    """Label of each image in the dataset.json files of an archive, by its key; None without such a file.

    Raises UserError if a file is damaged or has labels other than integers from 0.
    """
    labels: dict[str, int] = {}
    listed = False
    for path in archive.others:
        if path.rpartition("/")[2] != EDM_LABELS:
            continue
        where = f"{url}/{printable(path)}"
        folder = path[: -len(EDM_LABELS)]
        rows = _edm_rows(archive.read_other(path), where)
        if rows is None:
            continue
        listed = True
        for name, label in rows.items():
            if isinstance(label, bool) or not isinstance(label, int) or label < 0:
                raise UserError(f"{where}: label {label!r} of {name}; classes are integers from 0")
            labels[folder + name.replace("\\", "/")] = label
    return labels if listed else None


def _edm_rows(content: bytes, where: str) -> dict[str, Any] | None:
    """Labels by name; None if the file contains none."""
    try:
        tree: object = json.loads(content)
    except ValueError:
        raise UserError(
            f"{where}: not valid JSON; restore it, or remove it to take classes from folders"
        ) from None
    labels: object = cast(dict[str, Any], tree).get("labels") if isinstance(tree, dict) else None
    if not labels:
        return None
    try:
        return {str(name): label for name, label in dict(cast(Any, labels)).items()}
    except (TypeError, ValueError):
        raise UserError(f'{where}: labels must be a list of ["name", class]') from None


def annotated_classes(archive: Archive, folder: str, keys: Sequence[str]) -> list[str | None] | None:
    """Class of each key from the val_annotations.txt in the folder of a split; None without such a file."""
    path = f"{folder}/{ANNOTATIONS}" if folder else ANNOTATIONS
    if path not in archive.others:
        return None
    lines = archive.read_other(path).decode("utf-8", "surrogateescape").splitlines()
    classes = {row[0]: row[1] for line in lines if len(row := line.split("\t")) >= 2}
    return [classes.get(key.rpartition("/")[2]) for key in keys]


def is_label_list(path: str, edm: bool) -> bool:
    """Whether a file is a label list that is read; `edm`: whether EDM's dataset.json is."""
    return path.rpartition("/")[2] in ((EDM_LABELS, ANNOTATIONS) if edm else (ANNOTATIONS,))


def describe_classes(classes: Classes) -> str:
    """Short description of the classes."""
    if classes.count is None:
        return "none"
    if not classes.names:
        return f"{classes.count:,}, by number"
    shown = ", ".join(f"{number} = {name}" for number, name in enumerate(classes.names[:12]))
    more = f", and {classes.count - 12:,} more" if classes.count > 12 else ""
    return f"{classes.count:,}: {shown}{more}"


def untrained_numbers(classes: Classes, labels: NDArray[np.int64]) -> list[str]:
    """Note about classes that do not occur in the training labels, int64 [n]."""
    if not classes.count:
        return []
    names = classes.names or [str(number) for number in range(classes.count)]
    counts = np.bincount(labels, minlength=classes.count).tolist()
    return untrained(dict(zip(names, counts, strict=True)), names)


def untrained(counts: Mapping[str, int] | Counter[str], names: Sequence[str]) -> list[str]:
    """Note about classes without training images, if there are any."""
    missing = [printable(name) for name in names if not counts.get(name)]
    if not missing:
        return []
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5:,} more" if len(missing) > 5 else "")
    return [
        f"no training images of class {shown}"
        if len(missing) == 1
        else f"no training images of classes {shown}"
    ]
