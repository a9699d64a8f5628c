"""Writing one shard: a USTAR archive whose bytes depend on nothing but its content.

A block is three members with one key: NNNNNN-BBBB.x.npy, uint8 [n, C, H, W]; .y.npy, int64 [n],
absent without labels; .crc.npy, uint32 [n], the CRC-32 of each image's pixels.
(webdataset's own writer puts a PAX header with the time before each member.)
"""

import hashlib
import tarfile
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fm_core.data.crc import crc32
from fm_core.data.manifest import Block
from fm_core.data.sources.base import Rows

NPY_HEADER_BYTES = 128
TAR_RECORD_BYTES = 10_240


class ShardFile:
    """A shard that is being written."""

    def __init__(self, file: IO[bytes], number: int) -> None:
        self._file = file
        self._number = number
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.blocks: list[Block] = []

    def add(self, block_number: int, rows: Rows) -> None:
        """Append a block; one without images leaves no trace."""
        count = len(rows.images)
        if not count:
            return
        images = np.ascontiguousarray(rows.images)
        key = f"{self._number:06d}-{block_number:04d}"
        x_offset = self._add_array(f"{key}.x.npy", images)
        y_offset = None if rows.labels is None else self._add_array(f"{key}.y.npy", rows.labels)
        crc_offset = self._add_array(f"{key}.crc.npy", image_crcs(images))
        self.blocks.append(
            Block(
                images=count,
                x_offset=x_offset,
                x_bytes=images.nbytes,
                y_offset=y_offset,
                y_bytes=None if rows.labels is None else rows.labels.nbytes,
                crc_offset=crc_offset,
            )
        )

    def finish(self) -> str:
        """Write the archive's end; the SHA-256 of the file, in hexadecimal."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % TAR_RECORD_BYTES))
        return self._digest.hexdigest()

    def _add_array(self, name: str, array: NDArray[np.generic]) -> int:
        """Append a member; where its first element is."""
        return self._add(name, npy_header(array), array.data.cast("B")) + NPY_HEADER_BYTES

    def _add(self, name: str, *pieces: bytes | memoryview) -> int:
        """Append a member; where its content begins."""
        header = tarfile.TarInfo(name)
        header.size = sum(len(piece) for piece in pieces)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        start = self.bytes
        for piece in pieces:
            self._write(piece)
        self._write(bytes(-header.size % tarfile.BLOCKSIZE))
        return start

    def _write(self, piece: bytes | memoryview) -> None:
        self._file.write(piece)
        self._digest.update(piece)
        self.bytes += len(piece)


def image_crcs(images: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC-32 of each image's pixels; images uint8 [n, ...], C-contiguous; result uint32 [n]."""
    return np.array([crc32(image.data) for image in images], np.dtype("<u4"))


def npy_header(array: NDArray[np.generic]) -> bytes:
    """The .npy header (version 1.0) of a C-contiguous array, always 128 bytes.

    Spelled out here, as numpy's own spelling has changed between versions.
    """
    shape = "(" + ", ".join(map(str, array.shape)) + ("," if array.ndim == 1 else "") + ")"
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    head = b"\x93NUMPY\x01\x00" + (NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return head + text.encode().ljust(NPY_HEADER_BYTES - 11) + b"\n"
