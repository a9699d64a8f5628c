"""A file of an object store, read on through passing trouble."""

import io
from collections.abc import Callable
from typing import IO

from fm_core.storage.file_slice import SeekableFile

Retried = Callable[[Callable[[], bytes]], bytes]


class RemoteFile(SeekableFile):
    """Bytes of a file that is opened again where a read of it failed; for reading and seeking."""

    def __init__(self, open_file: Callable[[], IO[bytes]], retried: Retried) -> None:
        """Read the file that `open_file` opens; `retried` does an action again as the store has it.

        Raises what `retried` raises: UserError or FileNotFoundError.
        """
        self._open_file, self._retried = open_file, retried
        self._file: IO[bytes] | None = None
        self._at = self._size = 0
        self._retried(lambda: self._attempt(0))

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill the buffer as far as the file goes."""
        count = max(0, min(len(buffer), self._size - self._at))
        content = self._retried(lambda: self._attempt(count))
        buffer[:count] = content
        self._at += count
        return count

    def close(self) -> None:
        """Close the file."""
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()

    def _attempt(self, count: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open_file()
                self._size = self._file.seek(0, io.SEEK_END)
            self._file.seek(self._at)
            content = self._file.read(count)
            if len(content) != count:
                raise OSError(f"{len(content)} of {count} bytes came")
        except BaseException:
            self._file = None
            raise
        return content
