"""Detection of the format of a source by the names of the files at its URL."""

import os
import re
from collections.abc import Mapping
from typing import Any, cast

from fm_core.data.sources.archive_readers import is_image_file
from fm_core.data.sources.file_listing import (
    count_endings,
    endings_text,
    is_hidden,
    list_names,
    remote_listing,
)
from fm_core.data.sources.folder import ARCHIVE_SUFFIXES
from fm_core.data.sources.tar_archive import TarArchive
from fm_core.errors import UserError
from fm_core.storage.store import Store

# The first pattern that matches a path at most two levels deep decides.
PATTERNS: tuple[tuple[str, str], ...] = (
    ("imagenet-npz", r"imagenet\d+_(train|val)[^/]*\.zip|(.*/)?(train_data_batch_\d+|val_data)(\.npz)?"),
    ("imagenet-png", r"(train|valid)_(32x32|64x64)(\.tar|\.zip|/.*)?"),
    ("imagenet-tar", r"ILSVRC2012_img_(train|val)\.tar"),
    ("cifar10", r"cifar-10-python\.tar\.gz|(.*/)?(data_batch_1|test_batch)"),
    ("parquet", r".*\.parquet"),
    ("imagenet-folder", r"(train|train_blurred|ILSVRC2012_img_train)/n\d{8}|ILSVRC/Data"),
)
LABEL_SUFFIXES = (".cls", ".json", ".txt")


def detect(url: str) -> str:
    """Detect the format; UserError lists the formats that are recognized."""
    folder, _, name = url.rstrip("/").rpartition("/")
    if "{" in name:
        return "webdataset"
    if name.lower().endswith(ARCHIVE_SUFFIXES):
        return _kind_of_archive(Store.at(folder or ("/" if url.startswith("/") else ".")), name)
    store = Store.at(url)
    paths = _paths(store)
    for kind, pattern in PATTERNS:
        # Case-sensitive: ImageNet's folders are lower case, while a folder Train may be of any data set.
        flags = re.NOFLAG if kind == "imagenet-folder" else re.IGNORECASE
        if any(re.fullmatch(pattern, path, flags) for path in paths):
            # tiny-imagenet has the folders of ImageNet, with images one level deeper
            if kind == "imagenet-folder" and not _has_images(store, paths):
                continue
            return kind
    names = list_names(store)
    if any(is_image_file(path) for path in names):
        return "folder"
    if any(path.lower().endswith(".parquet") for path in names):
        return "parquet"
    archives = [path for path in names if path.lower().endswith(ARCHIVE_SUFFIXES)]
    if archives:
        return _kind_of_archive(store, archives[0])
    there = f" (but {endings_text(count_endings(names))})" if names else ""
    raise UserError(
        f"data.source.url: no format recognized under {url}{there}; expected one of: "
        "imagenet-npz (Imagenet64_train_part1_npz.zip, ...), imagenet-png (train_64x64.tar), imagenet-tar "
        "(ILSVRC2012_img_train.tar), imagenet-folder (train/<wnid>/), cifar10, parquet, webdataset, or folder"
    )


def _kind_of_archive(store: Store, path: str) -> str:
    """Format of a tar or zip: webdataset for a tar with labels next to the images, otherwise folder."""
    if path.lower().endswith(".zip") or store.size(path) is None:
        return "folder"
    tar = TarArchive(store, path)
    stems = {key.rpartition(".")[0] for key in tar.keys}
    labeled = any(
        other.lower().endswith(LABEL_SUFFIXES) and other.rpartition(".")[0] in stems for other in tar.others
    )
    return "webdataset" if labeled else "folder"


def _paths(store: Store) -> list[str]:
    """Paths of files and folders at most one level deep, relative to the store."""
    tops = _entries(store, "")
    below = [path for name, is_folder in tops if is_folder for path, _ in _entries(store, name)]
    return [name for name, _ in tops] + below


def _entries(store: Store, folder: str) -> list[tuple[str, bool]]:
    where = f"{store.path}/{folder}".rstrip("/")
    try:
        rows = cast(
            list[dict[str, Any]],
            remote_listing(store, lambda: store.filesystem.ls(where, detail=True)),
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = [(str(row["name"]).rstrip("/").rsplit("/", 1)[-1], _is_folder(store, row)) for row in rows]
    return sorted(
        (f"{folder}/{name}" if folder else name, is_folder)
        for name, is_folder in names
        if name and not is_hidden(name)
    )


def _is_folder(store: Store, row: Mapping[str, Any]) -> bool:
    """Whether an entry of a listing is a folder, or a link to one, whose type in fsspec is "other"."""
    if store.local is not None and row["type"] not in ("directory", "file"):
        return os.path.isdir(row["name"])  # noqa: PTH112
    return row["type"] == "directory"


def _has_images(store: Store, paths: list[str]) -> bool:
    """Whether class folders contain images directly; only the first few are checked."""
    folders = [path for path in paths if re.fullmatch(r".*/n\d{8}", path)][:3]
    return not folders or any(
        is_image_file(path) for folder in folders for path, _ in _entries(store, folder)[:100]
    )
