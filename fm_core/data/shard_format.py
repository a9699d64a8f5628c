"""Shard format: a USTAR archive whose bytes depend only on its content.

Layout block: a block is up to three members with one key, NNNNNN-BBBB.x.npy, uint8 [n, C, H, W]; .y.npy,
int64 [n], absent without labels; .crc.npy, uint32 [n], the CRC-32 of each image's pixels.
Layout image: an image is NNNNNN-IIIIII.png, .cls (absent without labels) and .json; at the end
__index__ (a name that webdataset skips), a .npy, holds the offset and size of each.
webdataset's own writer is not used, because it writes a PAX header with the time before each member.
"""

import hashlib
import io
import json
import tarfile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fm_core.data.manifest import Block, Layout
from fm_core.data.sources.base import Samples
from fm_core.storage.hashing import crc32

NPY_HEADER_BYTES = 128
TAR_RECORD_BYTES = 10_240


class Writable(Protocol):
    """Object with a file's `write` method for bytes."""

    def write(self, content: bytes | memoryview, /) -> int:
        """Write all bytes; returns their number."""
        ...


class ShardFile:
    """A shard being written."""

    def __init__(self, file: Writable, number: int, layout: Layout = "block") -> None:
        self._file = file
        self._number = number
        self._layout = layout
        self._digest = hashlib.sha256()
        self._index: list[tuple[int, int, int, int]] = []
        self.bytes = 0
        self.images = 0
        self.blocks: list[Block] = []
        self.index_offset: int | None = None

    def add(self, block_number: int, rows: Samples) -> None:
        """Append a block; does nothing if it has no images."""
        if not len(rows.images):
            return
        if self._layout == "block":
            self.add_block(block_number, rows.images, rows.labels)
            return
        images = np.ascontiguousarray(rows.images)
        crcs = image_crcs(images)
        for row, image in enumerate(images):
            label = None if rows.labels is None else int(rows.labels[row])
            self._add_png(f"{self._number:06d}-{self.images + row:06d}", image, label, int(crcs[row]))
        self.images += len(images)

    def add_block(
        self, block_number: int, images: NDArray[np.generic], labels: NDArray[np.int64] | None
    ) -> None:
        """Append a block of layout block, with images [n, C, H, W] of any type; uint8 in data sets."""
        key, images = f"{self._number:06d}-{block_number:04d}", np.ascontiguousarray(images)
        x_offset = self._add_array(f"{key}.x.npy", images)
        y_offset = None if labels is None else self._add_array(f"{key}.y.npy", labels)
        self.blocks.append(
            Block(
                images=len(images),
                x_offset=x_offset,
                x_bytes=images.nbytes,
                y_offset=y_offset,
                y_bytes=None if labels is None else labels.nbytes,
                crc_offset=self._add_array(f"{key}.crc.npy", image_crcs(images)),
            )
        )
        self.images += len(images)

    def finish(self) -> str:
        """Write the end of the archive; returns the SHA-256 of the file, in hexadecimal."""
        if self._layout == "image":
            index = np.array(self._index, np.int64).reshape(-1, 4)
            self.index_offset = self._add_array("__index__", index)
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % TAR_RECORD_BYTES))
        return self._digest.hexdigest()

    def _add_png(self, key: str, image: NDArray[np.uint8], label: int | None, crc: int) -> None:
        content = encode_png(image)
        offset = self._add(f"{key}.png", content)
        metadata: dict[str, int | str] = {"crc32": crc}
        if label is not None:
            self._add(f"{key}.cls", str(label).encode())
            metadata["label"] = label
        self._add(f"{key}.json", json.dumps(metadata).encode())
        self._index.append((offset, len(content), -1 if label is None else label, crc))

    def _add_array(self, name: str, array: NDArray[np.generic]) -> int:
        """Append a .npy member; returns the offset of its first element."""
        array = np.ascontiguousarray(array)
        return self._add(name, npy_header(array), array.reshape(-1).view(np.uint8).data) + NPY_HEADER_BYTES

    def _add(self, name: str, *chunks: bytes | memoryview) -> int:
        """Append a member; returns the offset of its content."""
        header = tarfile.TarInfo(name)
        header.size = sum(len(chunk) for chunk in chunks)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        start = self.bytes
        for chunk in chunks:
            self._write(chunk)
        self._write(bytes(-header.size % tarfile.BLOCKSIZE))
        return start

    def _write(self, chunk: bytes | memoryview) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self.bytes += len(chunk)


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [1 or 3, H, W] as a PNG, with unchanged intensities."""
    content = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def decode_png(content: bytes | memoryview) -> NDArray[np.uint8]:
    """Decode a PNG of `encode_png`: uint8 [1 or 3, H, W]."""
    pixels = np.asarray(Image.open(io.BytesIO(content)), np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def image_crcs(images: NDArray[np.generic]) -> NDArray[np.uint32]:
    """CRC-32 of each image's pixels; images [n, ...], C-contiguous; result uint32 [n]."""
    return np.array([crc32(image.data) for image in images], np.dtype("<u4"))


def npy_header(array: NDArray[np.generic]) -> bytes:
    """The .npy header (version 1.0) of a C-contiguous array, always 128 bytes.

    Built here, as numpy's own formatting has changed between versions.
    """
    shape = "(" + ", ".join(map(str, array.shape)) + ("," if array.ndim == 1 else "") + ")"
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    head = b"\x93NUMPY\x01\x00" + (NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return head + text.encode().ljust(NPY_HEADER_BYTES - 11) + b"\n"
