"""Listing of the files under a URL, and detection of changes to them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.retries import with_retries
from fm_core.storage.store import Store

# Keys of the fsspec libraries for the content or age of an object.
CHANGE_MARKERS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")


def list_files(store: Store, depth: int, skip_image_folders: bool = False) -> dict[str, int]:
    """Sizes of the files at most `depth` folders down, by path relative to the store; empty without a folder.

    With skip_image_folders, local folders of more than 2,000 files are skipped.
    """
    if store.local and skip_image_folders:
        return {path: (store.local / path).stat().st_size for path in list_names(store, depth, "", 2000)}
    listing = cast(
        dict[str, dict[str, object]],
        with_retries(lambda: store.filesystem.find(store.path, maxdepth=depth, detail=True), store.url),
    )
    prefix = store.path.rstrip("/") + "/"
    return {
        path[len(prefix) :]: int(str(info["size"]))
        for path, info in sorted(listing.items())
        if path.startswith(prefix)
    }


def list_names(store: Store, depth: int, below: str = "", max_files: int | None = None) -> list[str]:
    """Paths, relative to the store, of the files under `below`, at most `depth` folders down.

    Local folders are listed without sizes, which would take a minute for a million files. Folders with
    more than `max_files` files are skipped.
    """
    if store.local is None:
        where = f"{store.path}/{below}".rstrip("/")
        listing = with_retries(lambda: store.filesystem.find(where, maxdepth=depth), store.url)
        return sorted(path[len(store.path) + 1 :] for path in cast(list[str], listing))
    names: list[str] = []
    top = store.local / below
    for folder, folders, files in os.walk(top):
        if len(Path(folder).relative_to(top).parts) + 1 >= depth:
            folders.clear()
        if max_files is None or len(files) <= max_files:
            names += [os.path.relpath(os.path.join(folder, name), store.local) for name in files]  # noqa: PTH118
    return sorted(names)


def state_of(store: Store, paths: Iterable[str]) -> str:
    """Hash of the sizes and modification times (or entity tags) of files; "" without files."""
    unique = sorted(set(paths))
    if not unique:
        return ""
    if store.local:
        stats = [(store.local / path).stat() for path in unique]
        states = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(unique, stats, strict=True)]
    else:
        # One listing instead of one request per file.
        listing = cast(
            dict[str, dict[str, object]],
            with_retries(lambda: store.filesystem.find(store.path, detail=True), store.url),
        )
        infos = [listing.get(store.full(path), {}) for path in unique]
        states = [
            (path, info.get("size"), *(str(info.get(key)) for key in CHANGE_MARKERS))
            for path, info in zip(unique, infos, strict=True)
        ]
    return f"sha256:{sha256_bytes(repr(states).encode())}"
