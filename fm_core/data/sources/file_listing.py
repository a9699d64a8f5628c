"""Which files lie under a URL, and whether they were touched."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from fm_core.storage.retries import with_retries
from fm_core.storage.store import Store

# What object stores tell of an object's content or age, under the names of their fsspec libraries.
CHANGE_MARKERS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")


def list_files(store: Store, depth: int, skip_image_folders: bool = False) -> dict[str, int]:
    """Sizes of the files at most `depth` folders down, by path below the store; empty without a folder.

    With skip_image_folders, folders of many images are not looked into.
    """
    if store.local and skip_image_folders:
        return {path: (store.local / path).stat().st_size for path in list_names(store, depth, "", 2000)}
    found = cast(
        dict[str, dict[str, object]],
        with_retries(lambda: store.filesystem.find(store.path, maxdepth=depth, detail=True), store.url),
    )
    prefix = store.path.rstrip("/") + "/"
    return {
        path[len(prefix) :]: int(str(info["size"]))
        for path, info in sorted(found.items())
        if path.startswith(prefix)
    }


def list_names(store: Store, depth: int, below: str = "", most: int | None = None) -> list[str]:
    """Paths, below the store, of the files under `below`, at most `depth` folders down.

    Local folders are listed without asking for sizes, which takes a minute for a million files. Of a
    folder with more than `most` files nothing is listed.
    """
    if store.local is None:
        where = f"{store.path}/{below}".rstrip("/")
        found = with_retries(lambda: store.filesystem.find(where, maxdepth=depth), store.url)
        return sorted(path[len(store.path) + 1 :] for path in cast(list[str], found))
    names: list[str] = []
    top = store.local / below
    for folder, folders, files in os.walk(top):
        if len(Path(folder).relative_to(top).parts) + 1 >= depth:
            folders.clear()
        if most is None or len(files) <= most:
            names += [os.path.relpath(os.path.join(folder, name), store.local) for name in files]  # noqa: PTH118
    return sorted(names)


def state_of(store: Store, paths: Iterable[str]) -> str:
    """A hash over size and time of change (or entity tag) of files; "" for none of them."""
    wanted = sorted(set(paths))
    if not wanted:
        return ""
    if store.local:
        stats = [(store.local / path).stat() for path in wanted]
        facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(wanted, stats, strict=True)]
    else:
        # One listing instead of a request for each file.
        found = cast(
            dict[str, dict[str, object]],
            with_retries(lambda: store.filesystem.find(store.path, detail=True), store.url),
        )
        infos = [found.get(store.full(path), {}) for path in wanted]
        facts = [
            (path, info.get("size"), *(str(info.get(key)) for key in CHANGE_MARKERS))
            for path, info in zip(wanted, infos, strict=True)
        ]
    return f"sha256:{hashlib.sha256(repr(facts).encode()).hexdigest()}"
