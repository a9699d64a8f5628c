"""Images in an .npz file: uint8 arr_0 [N, height, width, channels], read in parts.

Reading parts in order takes linear time even if the array is compressed: the stream stays open between
parts and is restarted only to read an earlier part.
"""

import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.npz_members import read_npy_header
from fm_core.errors import UserError

IMAGES, LABELS = "arr_0", "arr_1"
"""Names of the arrays in ADM's layout, as np.savez(file, images, labels) writes them."""
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
EXPECTED = "uint8 [N, height, width, channels]"


def npz_arrays(path: Path) -> list[str]:
    """Names of the arrays in an .npz file. Raises UserError if it is not one or is not on a local disk."""
    if ":/" in str(path) and not path.exists():
        raise UserError(f"{printable(str(path))}: an .npz file is read from a local disk; copy it there")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{printable(str(path))} is no .npz file and contains no array {IMAGES}: {reason}"
        ) from None
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


class NpzImages:
    """Images in an .npz file, and their labels if the file has arr_1."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises UserError for an array that does not contain 8-bit images."""
        self.path = path
        self._stream: IO[bytes] | None = None
        self._archive: zipfile.ZipFile | None = None
        self._next = 0
        shape, fortran, dtype = self._header()
        where = f"{printable(str(path))}: {IMAGES}"
        if dtype != np.uint8:
            raise UserError(f"{where} is {dtype}; images are {EXPECTED}, quantized by whoever made them")
        if fortran:
            raise UserError(f"{where} is in Fortran order; save np.ascontiguousarray(images)")
        if len(shape) != 4 or shape[-1] not in (1, 3):
            hint = "; move the channels to the end" if len(shape) == 4 and shape[1] in (1, 3) else ""
            raise UserError(f"{where} is {list(shape)}; images are {EXPECTED}, of 1 or 3 channels{hint}")
        if not min(shape[1:]):
            raise UserError(f"{where} is {list(shape)}, without any pixels")
        self.count = int(shape[0])
        self.shape = (int(shape[3]), int(shape[1]), int(shape[2]))
        """Channels, height, width."""

    def read(self, images: range) -> Tensor:
        """Read consecutive images, uint8 [n, C, H, W]. Raises UserError for a damaged file."""
        size = prod(self.shape)
        try:
            content = self._bytes(images, size)
        except (*DAMAGE, OSError) as error:
            self.close()
            raise UserError(f"{printable(str(self.path))} is damaged: {error}") from None
        if len(content) != len(images) * size:
            self.close()
            raise UserError(
                f"{printable(str(self.path))} is damaged: {IMAGES} ends before image {images.stop}"
            )
        channels, height, width = self.shape
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return pixels.view(len(images), height, width, channels).permute(0, 3, 1, 2).contiguous()

    def labels(self) -> NDArray[np.int64] | None:
        """Class of each image, int64 [N]; None unless arr_1 contains one integer per image."""
        if LABELS not in npz_arrays(self.path):
            return None
        with suppress(*DAMAGE, ValueError, OSError), np.load(self.path, allow_pickle=False) as file:
            array: NDArray[Any] = file[LABELS]
            if array.shape == (self.count,) and array.dtype.kind in "iu":
                return array.astype(np.int64)
        return None

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        for each in (self._stream, self._archive):
            if each is not None:
                each.close()
        self._stream = self._archive = None

    def _header(self) -> tuple[Sequence[int], bool, np.dtype[Any]]:
        names = npz_arrays(self.path)
        if IMAGES not in names:
            held = f"it holds {', '.join(map(printable, names[:5]))}" if names else "it is empty"
            raise UserError(
                f"{printable(str(self.path))} contains no array {IMAGES} ({held}); "
                f"images are {IMAGES}, {EXPECTED}: np.savez(file, images)"
            )
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
                return read_npy_header(file)
        except (*DAMAGE, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{printable(str(self.path))}: {IMAGES} is damaged: {reason}") from None

    def _bytes(self, images: range, size: int) -> bytes:
        if self._stream is None or images.start < self._next:
            self.close()
            self._archive = zipfile.ZipFile(self.path)
            self._stream = self._archive.open(f"{IMAGES}.npy")
            read_npy_header(self._stream)
            self._next = 0
        self._stream.seek((images.start - self._next) * size, 1)
        content = self._stream.read(len(images) * size)
        self._next = images.stop
        return content
