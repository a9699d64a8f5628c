"""Detection of the format of a source by the names of the files at its URL."""

import re
from typing import Any, cast

from fm_core.data.sources.archive_readers import is_image_file
from fm_core.errors import UserError
from fm_core.storage.retries import with_retries
from fm_core.storage.store import Store

# The first pattern that matches a path at most two folders down decides.
PATTERNS: tuple[tuple[str, str], ...] = (
    ("imagenet-npz", r"imagenet\d+_(train|val)[^/]*\.zip|(.*/)?(train_data_batch_\d+|val_data)(\.npz)?"),
    ("imagenet-png", r"(train|valid)_(32x32|64x64)(\.tar|\.zip|/.*)?"),
    ("imagenet-tar", r"ILSVRC2012_img_(train|val)\.tar"),
    ("cifar10", r"cifar-10-python\.tar\.gz|(.*/)?(data_batch_1|test_batch)"),
    ("parquet", r".*\.parquet"),
    ("imagenet-folder", r"(train|train_blurred|ILSVRC2012_img_train)/n\d{8}|ILSVRC/Data"),
)


def detect(url: str) -> str:
    """Detect the format; UserError lists the formats that are recognized."""
    store = Store.at(url)
    paths = _paths(store)
    for kind, pattern in PATTERNS:
        if any(re.fullmatch(pattern, path, re.IGNORECASE) for path in paths):
            return kind
    if any(is_image_file(path) for path in paths) or _has_nested_image(store, paths):
        return "folder"
    raise UserError(
        f"data.source.url: no format recognized under {url}; expected one of: "
        "imagenet-npz (Imagenet64_train_part1_npz.zip, ...), imagenet-png (train_64x64.tar), imagenet-tar "
        "(ILSVRC2012_img_train.tar), imagenet-folder (train/<wnid>/), cifar10, parquet, or folder"
    )


def _paths(store: Store) -> list[str]:
    """Paths of files and folders at most one folder down, relative to the store."""
    tops = _entries(store, "")
    below = [path for name, is_folder in tops if is_folder for path, _ in _entries(store, name)]
    return [name for name, _ in tops] + below


def _entries(store: Store, folder: str) -> list[tuple[str, bool]]:
    where = f"{store.path}/{folder}".rstrip("/")
    try:
        rows = cast(
            list[dict[str, Any]],
            with_retries(lambda: store.filesystem.ls(where, detail=True), store.url),
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = [(str(row["name"]).rstrip("/").rsplit("/", 1)[-1], row["type"] == "directory") for row in rows]
    return sorted((f"{folder}/{name}" if folder else name, is_folder) for name, is_folder in names if name)


def _has_nested_image(store: Store, paths: list[str]) -> bool:
    """Whether there are images two folders down, as in train/<class>/."""
    return any(
        is_image_file(path) for folder in paths if "/" in folder for path, _ in _entries(store, folder)[:100]
    )
