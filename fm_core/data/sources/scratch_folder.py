"""Temporary local copies of a source without random access, one per node.

The last process that reads them removes them, at its exit at the latest. Copies of a killed process are
removed after a day by the next process that creates some.
"""

import atexit
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fm_core.errors import UserError
from fm_core.storage.file_lock import file_lock
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.local_paths import private_temporary_folder

COMPLETE = "ready"
"""Marker file, written when the copies are complete."""
STALE_SECONDS = 86_400
"""Age at which unused copies are removed."""


class ScratchFolder:
    """A private folder, shared by the processes of a node that read the same source."""

    def __init__(self, identity: str) -> None:
        """identity: string that identifies the content."""
        self._name = sha256_bytes(identity.encode("utf-8", "surrogateescape"))[:24]
        self._use: IO[bytes] | None = None

    def fill(self, make: Callable[[Path], None], bytes_needed: int) -> Path:
        """The folder, filled by `make` unless that was already done; other processes wait.

        It exists until `leave` or `remove`, regardless of other processes. Raises UserError if the disk has
        less than `bytes_needed` free, or becomes full, or if the folder belongs to another user.
        """
        path = self._path()
        _remove_stale(path.parent, time.time() - STALE_SECONDS)
        with file_lock(path.with_suffix(".lock")):
            atexit.unregister(self._remove_at_exit)
            atexit.register(self._remove_at_exit, path, os.getpid())
            if self._use is None:
                self._use = path.with_suffix(".users").open("ab")
                fcntl.flock(self._use, fcntl.LOCK_SH)
            if (path / COMPLETE).exists():
                return path
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            free = shutil.disk_usage(path).free
            if free < bytes_needed:
                raise UserError(
                    f"{path.parent}: {free / 1e9:.1f} GB free, a temporary copy of the source needs "
                    f"{bytes_needed / 1e9:.1f} GB; set {_variable()} to a larger disk"
                )
            try:
                make(path)
                (path / COMPLETE).touch()
            except OSError as error:
                shutil.rmtree(path, ignore_errors=True)
                raise UserError(
                    f"{path}: cannot write ({error.strerror or error}); set {_variable()}"
                ) from None
        return path

    def leave(self) -> None:
        """Allow other processes to remove the copies."""
        if self._use is not None:
            self._use.close()
            self._use = None

    def remove(self) -> None:
        """Remove the copies, if there are any and no other process reads them; lock files are kept."""
        self.leave()
        atexit.unregister(self._remove_at_exit)
        _remove_unused(self._path())

    def _remove_at_exit(self, path: Path, process: int) -> None:
        """Remove copies that were not released, since a process of a flow run may write only some shards."""
        self.leave()
        if process == os.getpid() and path.exists():
            with suppress(OSError):
                _remove_unused(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_use": None}

    def _path(self) -> Path:
        return private_temporary_folder("flow-matching-sources", _variable()) / self._name


def _remove_unused(path: Path) -> None:
    with file_lock(path.with_suffix(".lock")), path.with_suffix(".users").open("ab") as use:
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(path, ignore_errors=True)


def _remove_stale(parent: Path, before: float) -> None:
    """Remove unused copies that were created before a time."""
    for mark in parent.glob(f"*/{COMPLETE}"):
        with suppress(OSError):
            if mark.stat().st_mtime < before:
                _remove_unused(mark.parent)


def _variable() -> str:
    """The environment variable that determines the location of the copies."""
    return "XDG_CACHE_HOME" if os.environ.get("XDG_CACHE_HOME") else "TMPDIR"
