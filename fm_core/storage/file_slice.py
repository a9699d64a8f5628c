"""A file for reading that knows its size and where it is."""

import io


class SeekableFile(io.RawIOBase):
    """Reading and seeking by `_at` and `_size`, which the file itself keeps."""

    _at = 0
    _size = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte of it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """The byte it is at."""
        return self._at
