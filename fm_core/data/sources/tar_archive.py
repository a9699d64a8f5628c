"""Reader of the files of a tar, or of tars nested in a tar, by index."""

import posixpath
import tarfile
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, cast

import numpy as np

from fm_core.data.manifest import Input
from fm_core.data.sources.archive_readers import (
    MAX_FILE_BYTES,
    Archive,
    ZipArchive,
    digest_of,
    is_image_file,
)
from fm_core.data.sources.file_listing import is_hidden, printable, state_of
from fm_core.data.sources.npz_members import damage_message
from fm_core.errors import ImageDecodingError, UserError
from fm_core.storage.file_slice import FileSlice
from fm_core.storage.store import Store

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files."""
NOWHERE = -1
"""Offset of a link to a missing file, and of a sparse file."""
READ_BYTES = 2**20


class TarMember(NamedTuple):
    """A file in a tar."""

    key: str
    """Its name; in a nested tar, prefixed by the name of that tar without .tar."""
    offset: int
    """Offset of its content in bytes from the beginning of the outer tar; NOWHERE if it has none."""
    size: int
    """Size of its content in bytes."""
    changed: float
    """Modification time."""


class TarArchive:
    """Files in a tar, or in tars nested in a tar. Links are resolved to the files that they name."""

    def __init__(self, store: Store, path: str, nested: bool = False) -> None:
        """Read all headers; UserError for a damaged or compressed tar."""
        self._store, self._path = store, path
        self._file: IO[bytes] | None = None
        self._size = store.size(path) or 0
        try:
            with store.open(path) as file:
                members = list(_nested_members(file) if nested else list_members(file, 0))
        except OSError as error:
            raise UserError(damage_message(store, printable(path), error)) from None
        except (tarfile.TarError, EOFError) as error:
            raise UserError(self._damage(error)) from None
        images = sorted(
            (item for item in members if is_image_file(item.key)),
            key=lambda item: (item.key, item.offset, item.size, item.changed),
        )
        self._others = {
            _relative(item.key): item
            for item in members
            if not is_image_file(item.key) and not is_hidden(item.key)
        }
        self.keys = [_relative(item.key) for item in images]
        self.others = sorted(self._others)
        self._offsets = np.array([item.offset for item in images], np.int64)
        self._sizes = np.array([item.size for item in images], np.int64)
        self._digest = digest_of((item.key, item.size, item.changed) for item in images)
        if len(images) and int((self._offsets + self._sizes).max()) > self._size:
            raise UserError(damage_message(store, path, EOFError("its last file is truncated")))

    def read(self, number: int) -> bytes:
        """Content of an image file; ImageDecodingError for a link to a missing file."""
        if self._offsets[number] == NOWHERE:
            raise ImageDecodingError("link to a file that is not in the archive")
        if self._sizes[number] > MAX_FILE_BYTES:
            raise ImageDecodingError("too large")
        return self._read(int(self._offsets[number]), int(self._sizes[number]))

    def read_other(self, path: str) -> bytes:
        """Content of another file; b"" for a link to a missing file."""
        member = self._others[path]
        return b"" if member.offset == NOWHERE else self._read(member.offset, member.size)

    def close(self) -> None:
        """Close the tar."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def inputs(self) -> tuple[Input, ...]:
        """The tar, identified by the name, size and modification time of each image file in it."""
        return (Input(name=printable(self._path), bytes=self._size, digest=f"headers-{self._digest}"),)

    def state(self) -> str:
        """Size and modification time of the tar, which has no CRCs."""
        return state_of(self._store, [self._path])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _read(self, offset: int, size: int) -> bytes:
        if self._file is None:
            self._file = self._store.open(self._path)
        self._file.seek(offset)
        return self._file.read(size)

    def _damage(self, error: Exception) -> str:
        start = self._store.read_range(self._path, 0, 8)
        for magic, name in COMPRESSED.items():
            if start.startswith(magic):
                return f"{self._store.url}/{self._path}: compressed by {name}; unpack it to a plain .tar"
        return damage_message(self._store, self._path, error)


def open_archive(store: Store, path: str) -> Archive:
    """Open a .tar or .zip archive."""
    return ZipArchive(store, path) if path.lower().endswith(".zip") else TarArchive(store, path)


def list_members(file: IO[bytes], base: int, prefix: str = "") -> list[TarMember]:
    """The files of a tar that starts at offset `base` of an outer one, and of tars concatenated to it.

    Names begin with `prefix`; links become files with the content of their target. Raises tarfile.TarError
    for a damaged header.
    """
    members: list[TarMember] = []
    links: list[tuple[str, str, float]] = []
    start: int | None = 0
    while start is not None:
        part = cast(IO[bytes], FileSlice(file, start, 2**62, owns=False)) if start else file
        with tarfile.open(fileobj=part, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    offset = NOWHERE if member.issparse() else base + start + member.offset_data
                    members.append(TarMember(prefix + member.name, offset, member.size, member.mtime))
                elif member.islnk() or member.issym():
                    links.append((member.name, _target(member), member.mtime))
                # Otherwise tarfile keeps a kilobyte per member.
                cast(Any, archive).members = []
            start = _next_start(file, start + cast(int, cast(Any, archive).offset), base)
    return members + _resolve(links, members, prefix) if links else members


def _relative(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _target(link: tarfile.TarInfo) -> str:
    """Normalized name of a link's target; symbolic links are relative to their folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _resolve(links: list[tuple[str, str, float]], members: list[TarMember], prefix: str) -> list[TarMember]:
    """Resolve links to files; a broken link is kept if it is named like an image."""
    files = {posixpath.normpath(member.key.removeprefix(prefix)): member for member in members}
    targets = {posixpath.normpath(name): target for name, target, _ in links}
    resolved: list[TarMember] = []
    for name, target, changed in links:
        for _ in links:  # a link may name another link; bounded, in case of a loop
            if target in files or target not in targets:
                break
            target = targets[target]
        if target in files:
            resolved.append(files[target]._replace(key=prefix + name))
        elif is_image_file(name):
            resolved.append(TarMember(prefix + name, NOWHERE, 0, changed))
    return resolved


def _next_start(file: IO[bytes], end: int, base: int) -> int | None:
    """Offset of a tar after the end marker at `end`; None if nothing but zeros follows.

    Raises tarfile.TarError if there is no end marker, or something else follows it, since tarfile silently
    treats a damaged header as the end of the archive.
    """
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end marker at byte {base + end:,}")
    at = end + tarfile.BLOCKSIZE
    while content := file.read(READ_BYTES):
        zeros = len(content) - len(content.lstrip(b"\0"))
        if zeros < len(content):
            start = at + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            file.seek(start)
            try:
                tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
            except tarfile.HeaderError:
                raise tarfile.ReadError(
                    f"the data after its end at byte {base + start:,} is not a tar"
                ) from None
            return start
        at += len(content)
    return None


def _nested_members(file: IO[bytes]) -> list[TarMember]:
    """`list_members` for nested tars; names are prefixed by the name of their tar without .tar."""
    members: list[TarMember] = []
    for inner in list_members(file, 0):
        if inner.key.endswith(".tar") and not is_hidden(inner.key):
            inner_file = cast(IO[bytes], FileSlice(file, inner.offset, inner.size, owns=False))
            members += list_members(inner_file, inner.offset, PurePosixPath(inner.key).stem + "/")
    return members
