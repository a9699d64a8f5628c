"""A file of an object store whose reads are retried after temporary errors."""

import io
from collections.abc import Callable
from typing import IO

from fm_core.storage.file_slice import SeekableFile

Retry = Callable[[Callable[[], bytes]], bytes]


class RemoteFile(SeekableFile):
    """A seekable read-only file that is reopened after a failed read."""

    def __init__(self, open_file: Callable[[], IO[bytes]], retry: Retry) -> None:
        """Open the file.

        Args:
            open_file: opens the file; called for each attempt.
            retry: calls an action, repeatedly after temporary errors.

        Raises:
            UserError, FileNotFoundError: as `retry` raises them.
        """
        self._open_file, self._retry = open_file, retry
        self._file: IO[bytes] | None = None
        self._at = self._size = 0
        self._retry(lambda: self._attempt(0))

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill the buffer up to the end of the file; return the number of bytes read."""
        count = max(0, min(len(buffer), self._size - self._at))
        content = self._retry(lambda: self._attempt(count))
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
                raise OSError(f"received {len(content)} of {count} bytes")
        except BaseException:
            self._file = None
            raise
        return content
