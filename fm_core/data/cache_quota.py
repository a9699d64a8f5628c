"""Room in a folder of copies, reserved before a download begins: all downloads together keep the limit.

While x.tar is downloaded to x.partial, x.reserved has the size that it will have; it is a hole, which
takes no space. Whoever downloads holds a lock on x.lock, so what has no holder was left by a process
that was killed.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fm_core.errors import UserError
from fm_core.storage.file_lock import file_lock

POLL_SECONDS = 0.05


class CacheQuota:
    """The space of a folder, shared by all processes and threads of this machine."""

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self._folder, self._limit = folder, limit_bytes

    @contextmanager
    def reserved(self, path: Path, wanted: int) -> Generator[None]:
        """Keep `wanted` bytes for the copy `path`, whose lock the caller holds, until the block ends.

        The copies longest unused make room; where other downloads hold it, their end is waited for. Raises
        UserError for a copy larger than the limit.
        """
        if self._limit is not None and wanted > self._limit:
            raise UserError(
                f"data.cache_bytes: {self._limit} bytes do not hold one shard of {wanted} bytes; "
                "give the cache more space"
            )
        reservation = path.with_suffix(".reserved")
        while not self._reserve(reservation, wanted):
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            reservation.unlink(missing_ok=True)

    def _reserve(self, reservation: Path, wanted: int) -> bool:
        with file_lock(self._folder / "room.lock"):
            reservation.unlink(missing_ok=True)  # of a killed process: the caller holds the lock
            self._remove_abandoned(reservation)
            if self._limit is not None:
                held = sum(size for _, size, _ in self._files("*.reserved"))
                if held + wanted > self._limit:
                    return False
                self._evict(self._limit - held - wanted)
            with reservation.open("wb") as file:
                file.truncate(wanted)
        return True

    def _evict(self, most: int) -> None:
        """Remove the copies longest unused until the others have at most `most` bytes."""
        copies = self._files("*.tar")
        kept = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if kept <= most:
                return
            path.unlink(missing_ok=True)
            kept -= size

    def _remove_abandoned(self, own: Path) -> None:
        """Remove what killed processes left half-downloaded."""
        stems = {path.stem for kind in ("*.partial", "*.reserved") for path in self._folder.glob(kind)}
        for stem in stems - {own.stem}:
            with suppress(BlockingIOError), file_lock(self._folder / f"{stem}.lock", wait=False):
                for kind in (".partial", ".reserved"):
                    (self._folder / f"{stem}{kind}").unlink(missing_ok=True)

    def _files(self, pattern: str) -> list[tuple[float, int, Path]]:
        """Time of the last use, size and path of each file."""
        found: list[tuple[float, int, Path]] = []
        for path in self._folder.glob(pattern):
            with suppress(FileNotFoundError):  # a download ends meanwhile
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return found
