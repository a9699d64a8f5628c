"""Readers of many small files by number: in folders, in a zip, in a tar, in a tar of tars."""

import hashlib
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import IO, Any, Protocol, cast

import numpy as np

from fm_core.data.manifest import Input
from fm_core.data.sources.file_listing import list_names, state_of
from fm_core.data.sources.npz_members import damage_message
from fm_core.errors import UserError
from fm_core.storage.file_slice import FileSlice
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


class Archive(Protocol):
    """Files by number, sorted by their keys."""

    keys: list[str]
    """Path of each file in the archive."""

    def read(self, number: int) -> bytes:
        """Content of a file."""
        ...

    def close(self) -> None:
        """Close open files; reading opens them again."""
        ...

    def inputs(self) -> tuple[Input, ...]:
        """Inputs that identify the content, as far as names, sizes and the archive's metadata do."""
        ...

    def state(self) -> str:
        """Value that changes if a file changes; "" if the inputs hold the CRC of each file."""
        ...


class FolderArchive:
    """Files below a folder."""

    def __init__(self, store: Store, keys: Iterable[str]) -> None:
        """keys: paths of the files below the store."""
        self._store = store
        self.keys = sorted(keys)

    @classmethod
    def of_images(cls, store: Store, depth: int, below: str = "") -> "FolderArchive":
        """The image files under the folder `below`, at most `depth` folders down."""
        return cls(store, filter(is_image_file, list_names(store, depth, below)))

    def read(self, number: int) -> bytes:
        """Content of a file."""
        key = self.keys[number]
        return (self._store.local / key).read_bytes() if self._store.local else self._store.read_bytes(key)

    def close(self) -> None:
        """Does nothing."""

    def inputs(self) -> tuple[Input, ...]:
        """One input for the folder, identified by the names in it."""
        digest = sha256_bytes("\n".join(self.keys).encode())
        return (Input(name=".", bytes=0, digest=f"{len(self.keys)} names sha256:{digest}"),)

    def state(self) -> str:
        """Sizes and modification times of all files."""
        return state_of(self._store, self.keys)


class TarArchive:
    """Files in a tar, or in the tars that a tar holds."""

    def __init__(self, store: Store, path: str, nested: bool = False) -> None:
        """Read all headers; UserError for a damaged or compressed tar."""
        self._store, self._path = store, path
        self._file: IO[bytes] | None = None
        self._size = store.size(path) or 0
        try:
            with store.open(path) as file:
                rows = sorted(_nested_members(file) if nested else _members(file, 0))
        except tarfile.TarError as error:
            raise UserError(damage_message(store, path, error)) from None
        self.keys = [key for key, *_ in rows]
        self._offsets = np.array([offset for _, offset, _, _ in rows], np.int64)
        self._sizes = np.array([size for _, _, size, _ in rows], np.int64)
        self._digest = _digest((key, size, changed) for key, _, size, changed in rows)
        if len(rows) and int((self._offsets + self._sizes).max()) > self._size:
            raise UserError(damage_message(store, path, EOFError("its last file is truncated")))

    def read(self, number: int) -> bytes:
        """Content of a file."""
        if self._file is None:
            self._file = self._store.open(self._path)
        self._file.seek(int(self._offsets[number]))
        return self._file.read(int(self._sizes[number]))

    def close(self) -> None:
        """Close the tar."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def inputs(self) -> tuple[Input, ...]:
        """The tar, identified by the name, size and modification time of each file in it."""
        return (Input(name=self._path, bytes=self._size, digest=f"headers-{self._digest}"),)

    def state(self) -> str:
        """Size and modification time of the tar, which has no CRCs."""
        return state_of(self._store, [self._path])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class ZipArchive:
    """Files in a zip."""

    def __init__(self, store: Store, path: str) -> None:
        """Read the directory; UserError for a damaged zip."""
        self._store, self._path = store, path
        self._zip: zipfile.ZipFile | None = None
        self._size = store.size(path) or 0
        try:
            with store.open(path) as file, zipfile.ZipFile(file) as archive:
                infos = sorted(
                    (info.filename, info.file_size, info.CRC)
                    for info in archive.infolist()
                    if is_image_file(info.filename)
                )
        except zipfile.BadZipFile as error:
            raise UserError(damage_message(store, path, error)) from None
        self.keys = [name for name, *_ in infos]
        self._digest = _digest(infos)

    def read(self, number: int) -> bytes:
        """Content of a file; b"" if its CRC differs, which does not decode to an image."""
        if self._zip is None:
            self._zip = zipfile.ZipFile(self._store.open(self._path))
        try:
            return self._zip.read(self.keys[number])
        except zipfile.BadZipFile:
            return b""

    def close(self) -> None:
        """Close the zip."""
        if self._zip is not None:
            self._zip.close()
            self._zip = None

    def inputs(self) -> tuple[Input, ...]:
        """The zip, identified by the name, size and CRC of each file in it."""
        return (Input(name=self._path, bytes=self._size, digest=f"crcs-{self._digest}"),)

    def state(self) -> str:
        """Empty, as the inputs hold the CRCs."""
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}


def open_archive(store: Store, path: str) -> Archive:
    """Open a .tar or .zip archive."""
    return ZipArchive(store, path) if path.endswith(".zip") else TarArchive(store, path)


def is_image_file(path: str) -> bool:
    """Whether a path has the suffix of an image file and is not hidden."""
    name = PurePosixPath(path).name.lower()
    return name.endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _digest(rows: Iterable[tuple[object, ...]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return f"sha256:{digest.hexdigest()}"


def _members(
    file: IO[bytes], base: int, select: Callable[[str], bool] = is_image_file, prefix: str = ""
) -> Iterable[tuple[str, int, int, float]]:
    """Name, offset, size and modification time of the files of a tar that starts at offset `base`."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isfile() and select(member.name):
                yield prefix + member.name, base + member.offset_data, member.size, member.mtime
            # Otherwise tarfile keeps a kilobyte for each of a million members.
            cast(Any, archive).members = []
        # tarfile silently takes a damaged header for the end of the archive.
        file.seek(cast(Any, archive).offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end marker at byte {base + cast(Any, archive).offset:,}")


def _nested_members(file: IO[bytes]) -> Iterable[tuple[str, int, int, float]]:
    """As `_members`, for the tars in a tar; names are prefixed by the name of their tar without .tar."""
    inner = list(_members(file, 0, lambda name: name.endswith(".tar")))
    for name, offset, size, _ in inner:
        inner_file = cast(IO[bytes], FileSlice(file, offset, size, owns=False))
        yield from _members(inner_file, offset, is_image_file, PurePosixPath(name).stem + "/")
