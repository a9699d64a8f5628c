"""Arrays in .npz files, which may be members of zips, read without extracting everything."""

import io
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fm_core.data.manifest import Input
from fm_core.errors import UserError
from fm_core.storage.file_slice import FileSlice
from fm_core.storage.store import Store

KNOWN_METHODS = {
    getattr(zipfile, name)
    for name in ("ZIP_STORED", "ZIP_DEFLATED", "ZIP_BZIP2", "ZIP_LZMA", "ZIP_ZSTANDARD")
    if hasattr(zipfile, name)
}
METHOD_NAMES = {1: "Shrink", 6: "Implode", 9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
LOCAL_HEADER = struct.Struct("<4sHHHHHLLLHH")


@dataclass(frozen=True)
class Location:
    """A file under the source's URL, or a member of a zip there."""

    path: str
    """Path relative to the URL."""
    member: str | None = None
    """Name of the member; None for the file itself."""
    bytes: int = 0
    """Size in bytes."""
    digest: str = ""
    """Identifies the content, e.g. by its CRC-32."""

    @property
    def name(self) -> str:
        """File name without folders."""
        return PurePosixPath(self.member or self.path).name

    @property
    def text(self) -> str:
        """Name for messages."""
        return f"{self.path}[{self.member}]" if self.member else self.path


def open_stream(store: Store, location: Location) -> IO[bytes]:
    """Open for sequential reading."""
    if location.member is None:
        return store.open(location.path)
    archive = zipfile.ZipFile(store.open(location.path))
    return archive.open(location.member)


def zip_members(store: Store, path: str) -> list[Location]:
    """Files in a zip, with the CRC-32s of its directory; UserError for a damaged zip."""
    try:
        with store.open(path) as file, zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise UserError(damage_message(store, path, error)) from None
    for info in members:
        check_zip_member(store, path, info)
    return [Location(path, info.filename, info.file_size, f"crc32:{info.CRC:08x}") for info in members]


def check_zip_member(store: Store, path: str, info: zipfile.ZipInfo) -> None:
    """Raise UserError for a member that is encrypted, or compressed by an unsupported method."""
    where = f"{store.url}/{path}: {info.filename} is"
    if info.flag_bits & 1:
        raise UserError(f"{where} encrypted; unpack the archive")
    if info.compress_type not in KNOWN_METHODS:
        name = METHOD_NAMES.get(info.compress_type, f"method {info.compress_type}")
        raise UserError(f"{where} packed by {name}, which Python cannot read; unpack the archive")


def damage_message(store: Store, path: str, error: Exception) -> str:
    """Error message for a file that is damaged or incomplete."""
    return f"{store.url}/{path}: damaged or incomplete ({error}); download it again"


def open_location(store: Store, location: Location) -> IO[bytes]:
    """Open as a seekable file; a compressed member of a zip is first extracted to a temporary file."""
    if location.member is None:
        return store.open(location.path)
    file = store.open(location.path)
    archive = zipfile.ZipFile(file)
    info = archive.getinfo(location.member)
    if info.compress_type == zipfile.ZIP_STORED:
        return cast(
            IO[bytes], io.BufferedReader(FileSlice(file, _content_offset(file, info), info.file_size))
        )
    spool = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    with file, archive, archive.open(info) as member:
        shutil.copyfileobj(member, spool, 2**22)
    spool.seek(0)
    return spool


def peek_shape(store: Store, location: Location, array: str) -> tuple[int, ...] | None:
    """Shape of `array`.npy in an .npz, from its beginning only; None if that does not suffice."""
    if location.member is None:
        with store.open(location.path) as file:
            return _read_shape(file, f"{array}.npy")
    with (
        store.open(location.path) as file,
        zipfile.ZipFile(file) as archive,
        archive.open(location.member) as member,
    ):
        return _read_shape(member, f"{array}.npy")


def read_array(store: Store, location: Location, array: str) -> NDArray[Any]:
    """Read `array`.npy of an .npz; if in a zip, decompress only the bytes up to the array if possible.

    Raises ValueError, KeyError or BadZipFile for anything else.
    """
    if location.member is not None:
        with open_stream(store, location) as file:
            member = _seek_member(file, f"{array}.npy")
            if member is not None and member.stored is not None:
                content = file.read(member.stored)
                content = zlib.decompress(content, -15) if member.deflated else content
                return npy.read_array(io.BytesIO(content), allow_pickle=False)
    with (
        open_location(store, location) as file,
        zipfile.ZipFile(file) as npz,
        npz.open(f"{array}.npy") as values,
    ):
        return npy.read_array(values, allow_pickle=False)


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether in Fortran order, and dtype; leaves the file at the first element. Raises ValueError."""
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    if version == (2, 0):
        return npy.read_array_header_2_0(file)
    raise ValueError(f"npy version {version}")


def as_inputs(locations: Iterable[Location]) -> tuple[Input, ...]:
    """The locations as inputs of the manifest."""
    return tuple(Input(name=item.text, bytes=item.bytes, digest=item.digest) for item in locations)


def _read_shape(file: IO[bytes], target: str) -> tuple[int, ...] | None:
    member = _seek_member(file, target)
    if member is None:
        return None
    start = file.read(4096)
    text = zlib.decompressobj(-15).decompress(start, 1024) if member.deflated else start
    return read_npy_header(io.BytesIO(text))[0]


@dataclass(frozen=True)
class _Member:
    """Member of a zip that is read as a stream, positioned at its first byte."""

    deflated: bool
    stored: int | None
    """Compressed size in bytes; None if it is stored only after the content."""


def _seek_member(file: IO[bytes], target: str) -> _Member | None:
    """Follow the local headers of a zip to a member, without seeking."""
    while len(head := file.read(LOCAL_HEADER.size)) == LOCAL_HEADER.size:
        magic, _, flags, method, _, _, _, stored, size, name_bytes, extra_bytes = LOCAL_HEADER.unpack(head)
        if magic != b"PK\x03\x04":
            return None
        name = file.read(name_bytes).decode(errors="replace")
        stored = _stored_bytes(stored, size, file.read(extra_bytes))
        stored = None if flags & 8 else stored
        if name == target:
            return _Member(method == zipfile.ZIP_DEFLATED, stored)
        if stored is None:
            return None
        while stored:
            chunk = file.read(min(stored, 2**20))
            if not chunk:
                return None
            stored -= len(chunk)
    return None


def _stored_bytes(stored: int, size: int, extra: bytes) -> int | None:
    """Compressed size of a member, from the zip64 field if there is one."""
    if stored != 0xFFFFFFFF:
        return stored
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            values = struct.unpack(f"<{length // 8}Q", extra[4 : 4 + length // 8 * 8])
            index = 1 if size == 0xFFFFFFFF else 0
            return int(values[index]) if len(values) > index else None
        extra = extra[4 + length :]
    return None


def _content_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    fields = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    return info.header_offset + LOCAL_HEADER.size + fields[9] + fields[10]
