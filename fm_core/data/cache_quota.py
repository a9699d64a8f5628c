"""Size limit of a cache folder. Space is reserved before a download starts, so the limit always holds.

While x.tar is downloaded to x.partial, x.reserved has its final size; it is a sparse file, which takes no
space. The downloading process holds a lock on x.lock, so a reservation whose lock is free belongs to a
process that was killed.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fm_core.errors import UserError
from fm_core.storage.file_lock import file_lock

POLL_SECONDS = 0.05


class CacheQuota:
    """Size limit of a folder that is shared by all processes and threads of this machine."""

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self._folder, self._limit = folder, limit_bytes

    @contextmanager
    def reserved(self, path: Path, size: int) -> Generator[None]:
        """Reserve `size` bytes during the block for the copy `path`, whose lock the caller holds.

        The least recently used copies are evicted; if other downloads occupy the space, waits for them.
        Raises UserError for a copy larger than the limit.
        """
        if self._limit is not None and size > self._limit:
            raise UserError(
                f"data.cache_bytes: {self._limit} bytes do not hold one shard of {size} bytes; increase it"
            )
        reservation = path.with_suffix(".reserved")
        while not self._reserve(reservation, size):
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            reservation.unlink(missing_ok=True)

    def _reserve(self, reservation: Path, size: int) -> bool:
        with file_lock(self._folder / "room.lock"):
            reservation.unlink(missing_ok=True)  # of a killed process, since the caller holds the lock
            self._remove_abandoned(reservation)
            if self._limit is not None:
                reserved = sum(length for _, length, _ in self._files("*.reserved"))
                if reserved + size > self._limit:
                    return False
                self._evict(self._limit - reserved - size)
            with reservation.open("xb") as file:  # in a folder that no other user can write to (cache.py)
                file.truncate(size)
        return True

    def _evict(self, limit: int) -> None:
        """Remove the least recently used copies until the rest has at most `limit` bytes."""
        copies = self._files("*.tar")
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _remove_abandoned(self, own: Path) -> None:
        """Remove partial downloads and reservations of killed processes."""
        stems = {path.stem for kind in ("*.partial", "*.reserved") for path in self._folder.glob(kind)}
        for stem in stems - {own.stem}:
            with suppress(BlockingIOError), file_lock(self._folder / f"{stem}.lock", wait=False):
                for kind in (".partial", ".reserved"):
                    (self._folder / f"{stem}{kind}").unlink(missing_ok=True)

    def _files(self, pattern: str) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of each file."""
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.glob(pattern):
            with suppress(FileNotFoundError):  # a download ended in the meantime
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        return files
