"""Seekable read-only files, and file objects for a slice of a file."""

import io
from typing import IO


class SeekableFile(io.RawIOBase):
    """Base class of raw read-only files with their position in `_at` and their size in `_size`."""

    _at = 0
    _size = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte offset, at least 0; return the new position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Current position in bytes."""
        return self._at


class FileSlice(SeekableFile):
    """Bytes [start, start + size) of a file, which is closed with the slice if `owns`."""

    def __init__(self, file: IO[bytes], start: int, size: int, owns: bool = True) -> None:
        self._file, self._start, self._size, self._at, self._owns = file, start, size, 0, owns

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill the buffer up to the end of the slice; return the number of bytes read."""
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        """Close the slice, and the file if the slice owns it."""
        if self._owns and not self.closed:
            self._file.close()
        super().close()
