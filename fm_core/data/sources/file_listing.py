"""Listing of the files under a URL: hidden entries, links, and detection of changes."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import TypeVar, cast

from fm_core.errors import UserError
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.retries import one_line, with_retries
from fm_core.storage.store import Store

T = TypeVar("T")

# Keys of fsspec libraries for the content hash or age of an object.
CHANGE_MARKERS = (
    *("blob_id", "xet_hash"),
    *("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created"),
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that break a line or control a terminal."""
SYSTEM_NAMES = {
    "@__thumb",
    "_thumbnails",
    "_thumbs",
    "thumbnails",
    "ehthumbs.db",
    "found.000",
    "recycler",
    "@eadir",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "$recycle.bin",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
"""Folders and files that operating systems, network storage and viewers create; in lower case."""


def is_hidden(path: str) -> bool:
    """Whether a relative path, or a folder on it, is hidden or a system entry."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM_NAMES
        for part in path.split("/")
    )


def printable(name: str) -> str:
    """A file name for messages and records; line breaks and invalid UTF-8 are escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def composed(name: str) -> str:
    """A name in composed Unicode form (NFC), since macOS and Linux use different forms."""
    return unicodedata.normalize("NFC", name)


def name_bytes(name: str) -> bytes:
    """The bytes of a file name in the file system."""
    return name.encode("utf-8", "surrogateescape")


def count_endings(paths: Iterable[str]) -> dict[str, int]:
    """Number of files by extension, in lower case and most frequent first; "no ending" without one."""
    counts = Counter(printable(PurePosixPath(path).suffix.lower()) or "no ending" for path in paths)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def endings_text(counts: Mapping[str, int]) -> str:
    """Format counts of `count_endings` as one line, e.g. "12 .heic, 3 .txt"."""
    return ", ".join(f"{count:,} {ending}" for ending, count in counts.items())


def list_files(store: Store, depth: int | None, skip_image_folders: bool = False) -> dict[str, int]:
    """Sizes of the files at most `depth` levels deep, by path relative to the store; {} without a folder.

    Hidden entries are omitted. With skip_image_folders, local folders of more than 2,000 files are skipped.
    """
    if store.local:
        names = list_names(store, depth, "", 2000 if skip_image_folders else None)
        return {path: _status(os.path.join(store.local, path))[0] for path in names}  # noqa: PTH118
    listing = _found_at(store, store.path, depth)
    prefix = store.path.rstrip("/") + "/"
    return {
        path[len(prefix) :]: int(str(info["size"]))
        for path, info in sorted(listing.items())
        if path.startswith(prefix) and not is_hidden(path[len(prefix) :])
    }


def list_names(
    store: Store,
    depth: int | None = None,
    below: str = "",
    max_files: int | None = None,
    empty_folders: list[str] | None = None,
) -> list[str]:
    """Paths, relative to the store, of the files under `below`, at most `depth` levels deep.

    Hidden entries are omitted; links are followed, but not to a parent folder. Local folders are listed
    without sizes, which would take a minute for a million files. Folders with more than `max_files` files are
    skipped; empty local folders are appended to `empty_folders`. Raises UserError for a folder that cannot be
    listed.
    """
    if store.local is None:
        listing = _found_at(store, f"{store.path}/{below}".rstrip("/"), depth)
        names = (path[len(store.path.rstrip("/")) + 1 :] for path in listing)
        return sorted(name for name in names if not is_hidden(name))
    top = os.path.join(store.local, below) if below else str(store.local)  # noqa: PTH118
    if not os.path.isdir(top):  # noqa: PTH112
        return []
    entries = list(_walk(top, f"{below.rstrip('/')}/" if below else "", depth, max_files, frozenset()))
    if empty_folders is not None:
        empty_folders += [name for name in entries if name.endswith("/")]
    return sorted(name for name in entries if not name.endswith("/"))


def remote_listing(store: Store, action: Callable[[], T]) -> T:
    """Result of listing a remote store, with retries; FileNotFoundError if there is no such folder.

    Raises UserError if the store itself does not exist, e.g. a data set of the Hugging Face hub.
    """
    try:
        return with_retries(action, store.url)
    except FileNotFoundError as error:
        if error.__cause__ is None:  # omits the library's reason
            raise
        raise UserError(f"data.source.url: {store.url}: {one_line(error)}") from None
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data.source.url: {store.url}: {one_line(error)}") from None


def _found_at(store: Store, path: str, depth: int | None) -> dict[str, dict[str, object]]:
    """Properties of the files below a path of a remote store, by path; {} if there is no such folder."""
    try:
        listing = remote_listing(store, lambda: store.filesystem.find(path, maxdepth=depth, detail=True))
    except FileNotFoundError:
        return {}
    return cast(dict[str, dict[str, object]], listing)


def _walk(
    folder: str, prefix: str, depth: int | None, max_files: int | None, above: frozenset[tuple[int, int]]
) -> Iterator[str]:
    """Paths of the files in a local folder, and of empty folders, each after `prefix`.

    `above` are the parent folders; paths of folders end in "/".
    """
    try:
        status = os.stat(folder)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if not is_hidden(entry.name)]
    except OSError as error:
        raise UserError(
            f"{printable(folder)}: cannot be listed ({error.strerror}); fix its permissions"
        ) from None
    folders = [entry.name for entry in entries if entry.is_dir()]
    # A broken link counts as a file, to be quarantined by name. Pipes and devices are ignored.
    files = [
        entry.name for entry in entries if entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    ]
    if not entries:
        yield prefix or "/"
    if max_files is None or len(files) <= max_files:
        yield from (prefix + name for name in files)
    if depth is None or depth > 1:
        for name in folders:
            below = None if depth is None else depth - 1
            yield from _walk(f"{folder}/{name}", f"{prefix}{name}/", below, max_files, above | {identity})


def state_of(store: Store, paths: Iterable[str]) -> str:
    """Hash of the sizes and modification times (or entity tags) of files; "" without files."""
    unique = sorted(set(paths))
    if not unique:
        return ""
    if store.local:
        states = [(path, *_status(os.path.join(store.local, path))) for path in unique]  # noqa: PTH118
    else:
        # One listing instead of one request per file.
        listing = _found_at(store, store.path, None)
        infos = [listing.get(store.full(path), {}) for path in unique]
        states = [
            (path, info.get("size"), *(str(info.get(key)) for key in CHANGE_MARKERS))
            for path, info in zip(unique, infos, strict=True)
        ]
    return f"sha256:{sha256_bytes(repr(states).encode('utf-8', 'surrogateescape'))}"


def _status(path: str) -> tuple[int, int]:
    """Size and modification time in nanoseconds; zeros for a broken link."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
