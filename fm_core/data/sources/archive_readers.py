"""Readers of many small files by index: in folders, in a zip, in several archives (tars: tar_archive.py)."""

import errno
import hashlib
import lzma
import os
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

from fm_core.data.manifest import Input
from fm_core.data.sources.file_listing import is_hidden, list_names, name_bytes, printable, state_of
from fm_core.data.sources.npz_members import check_zip_member, damage_message
from fm_core.errors import ImageDecodingError, UserError
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store

IMAGE_SUFFIXES = (
    *(
        ".jpeg",
        ".jpg",
        ".jpe",
        ".jfif",
        ".jif",
        ".png",
        ".apng",
        ".webp",
        ".avif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
    ),
    *(".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".tga", ".qoi"),
)
"""Extensions of the image files that Pillow reads."""
MAX_FILE_BYTES = 2**30
"""Size of the largest image file that is read."""
OPEN_ARCHIVES = 128
"""Largest number of open archives of a group; by default a process may open only 1,024 files."""
UNREADABLE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO}
"""Errors of a single file, which is quarantined; other errors concern the disk or the machine."""
ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class Archive(Protocol):
    """Files by index, sorted by their keys."""

    @property
    def keys(self) -> Sequence[str]:
        """Path of each image file in the archive."""
        ...

    @property
    def others(self) -> Sequence[str]:
        """Paths of the other files that are not hidden."""
        ...

    def read(self, number: int) -> bytes:
        """Content of an image file; ImageDecodingError if this file cannot be read."""
        ...

    def read_other(self, path: str) -> bytes:
        """Content of a file in `others`."""
        ...

    def close(self) -> None:
        """Close open files; reading opens them again."""
        ...

    def inputs(self) -> tuple[Input, ...]:
        """Inputs that identify the content by names, sizes and the archive's metadata."""
        ...

    def state(self) -> str:
        """Value that changes if a file changes; "" if the inputs contain the CRC of each file."""
        ...


class FolderArchive:
    """Files below a folder."""

    def __init__(self, store: Store, paths: Iterable[str], empty_folders: Iterable[str] = ()) -> None:
        """paths: files below the store, none of them hidden; empty_folders end in "/"."""
        self.empty_folders = sorted(empty_folders)
        self._store = store
        self.keys: list[str] = []
        self.others: list[str] = []
        for path in sorted(paths):
            (self.keys if is_image_file(path) else self.others).append(path)

    @classmethod
    def listed(cls, store: Store, depth: int | None = None, below: str = "") -> "FolderArchive":
        """The files under the folder `below`, at most `depth` folders down."""
        empty: list[str] = []
        return cls(store, list_names(store, depth, below, empty_folders=empty), empty)

    def read(self, number: int) -> bytes:
        """Content of an image file; ImageDecodingError for a broken link or without permission."""
        key = self.keys[number]
        try:
            if self._store.local is None:
                return self._store.read_bytes(key)
            with open(os.path.join(self._store.local, key), "rb", buffering=0) as file:  # noqa: PTH118, PTH123
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise ImageDecodingError("too large")
                return file.readall()
        except OSError as error:
            if error.errno in UNREADABLE or isinstance(error, FileNotFoundError):
                reason = error.strerror or os.strerror(errno.ENOENT)
                raise ImageDecodingError(f"cannot be read ({reason})") from None
            where = f"{self._store.url}/{printable(key)}"
            raise UserError(
                f"{where}: cannot be read ({error.strerror or error}); fix the cause and rerun"
            ) from None

    def read_other(self, path: str) -> bytes:
        """Content of another file; UserError if it cannot be read."""
        try:
            return self._store.read_bytes(path)
        except OSError as error:
            where = f"{self._store.url}/{printable(path)}"
            raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None

    def close(self) -> None:
        """Do nothing."""

    def inputs(self) -> tuple[Input, ...]:
        """One input for the folder, identified by the names in it."""
        digest = sha256_bytes(name_bytes("\n".join(self.keys)))
        return (Input(name=".", bytes=0, digest=f"{len(self.keys)} names sha256:{digest}"),)

    def state(self) -> str:
        """Sizes and modification times of all image files."""
        return state_of(self._store, self.keys)


class ZipArchive:
    """Files in a zip."""

    def __init__(self, store: Store, path: str) -> None:
        """Read the directory; UserError for a damaged or encrypted zip, or an unknown compression."""
        self._store, self._path = store, path
        self._zip: zipfile.ZipFile | None = None
        self._size = store.size(path) or 0
        images: list[tuple[str, int, int, zipfile.ZipInfo]] = []
        self._others: dict[str, zipfile.ZipInfo] = {}
        try:
            with store.open(path) as file, zipfile.ZipFile(file) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
            raise UserError(damage_message(store, printable(path), error)) from None
        for info in members:
            name = info.filename.replace("\\", "/")  # some programs write Windows separators
            if is_image_file(name):
                check_zip_member(store, path, info)
                images.append((name, info.file_size, info.CRC, info))
            elif not is_hidden(name):
                self._others[name] = info
        images.sort(key=lambda row: row[:3])
        # By its entry, because two members of a zip may have the same name.
        self._members = [info for *_, info in images]
        self.keys = [name for name, *_ in images]
        self.others = sorted(self._others)
        self._digest = digest_of(row[:3] for row in images)

    def read(self, number: int) -> bytes:
        """Content of an image file; b"" if its CRC differs, which does not decode to an image."""
        info = self._members[number]
        if info.file_size > MAX_FILE_BYTES:
            raise ImageDecodingError("too large")
        try:
            return self._open().read(info)
        except ZIP_DAMAGE:
            return b""

    def read_other(self, path: str) -> bytes:
        """Content of another file; UserError if it is damaged."""
        check_zip_member(self._store, self._path, self._others[path])
        try:
            return self._open().read(self._others[path])
        except ZIP_DAMAGE as error:
            raise UserError(damage_message(self._store, f"{self._path}[{path}]", error)) from None

    def close(self) -> None:
        """Close the zip."""
        if self._zip is not None:
            self._zip.close()
            self._zip = None

    def inputs(self) -> tuple[Input, ...]:
        """The zip, identified by the name, size and CRC of each image file in it."""
        return (Input(name=printable(self._path), bytes=self._size, digest=f"crcs-{self._digest}"),)

    def state(self) -> str:
        """Empty, because the inputs contain the CRCs."""
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            self._zip = zipfile.ZipFile(self._store.open(self._path))
        return self._zip


class ArchiveGroup:
    """The files of several archives; keys are prefixed with the name of the archive like a folder."""

    def __init__(self, archives: Sequence[tuple[str, Archive]]) -> None:
        """archives: names and archives; they are sorted by name."""
        self._archives = dict(sorted(archives, key=lambda item: item[0]))
        self.keys = [f"{name}/{key}" for name, archive in self._archives.items() for key in archive.keys]
        self.others = [
            f"{name}/{path}" for name, archive in self._archives.items() for path in archive.others
        ]
        counts = [len(archive.keys) for archive in self._archives.values()]
        self._starts = [sum(counts[:number]) for number in range(len(counts))]
        self._names = list(self._archives)
        self._open: dict[str, None] = {}  # least recently used first

    def read(self, number: int) -> bytes:
        """Content of an image file."""
        place = bisect_right(self._starts, number) - 1
        name = self._names[place]
        self._open.pop(name, None)
        self._open[name] = None
        if len(self._open) > OPEN_ARCHIVES:
            oldest = next(iter(self._open))
            del self._open[oldest]
            self._archives[oldest].close()
        return self._archives[name].read(number - self._starts[place])

    def read_other(self, path: str) -> bytes:
        """Content of another file."""
        name = next(name for name in self._archives if path.startswith(f"{name}/"))
        return self._archives[name].read_other(path[len(name) + 1 :])

    def close(self) -> None:
        """Close all archives."""
        for archive in self._archives.values():
            archive.close()

    def inputs(self) -> tuple[Input, ...]:
        """The inputs of all archives."""
        return tuple(item for archive in self._archives.values() for item in archive.inputs())

    def state(self) -> str:
        """The states of all archives."""
        return " ".join(archive.state() for archive in self._archives.values())


def is_image_file(path: str) -> bool:
    """Whether a path has the extension of an image file and is not hidden."""
    return (
        path.lower().endswith(IMAGE_SUFFIXES) and "." in PurePosixPath(path).name[1:] and not is_hidden(path)
    )


def digest_of(rows: Iterable[tuple[object, ...]]) -> str:
    """Hash of rows of plain values."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogateescape"))
    return f"sha256:{digest.hexdigest()}"
