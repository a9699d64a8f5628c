"""Local copies of a source that cannot be read in a random order: made once per node, removed afterwards."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fm_core.errors import UserError
from fm_core.storage.file_lock import file_lock
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.local_paths import private_temporary_folder

COMPLETE = "ready"
"""File that is written when the copies are complete."""


class ScratchFolder:
    """A folder that only this user reads, shared by the processes of a node that read the same source."""

    def __init__(self, identity: str) -> None:
        """identity: text that differs for other content."""
        self._name = sha256_bytes(identity.encode("utf-8", "surrogateescape"))[:24]
        self._use: IO[bytes] | None = None

    def fill(self, make: Callable[[Path], None], bytes_needed: int) -> Path:
        """The folder, filled by `make` unless that was done before; other processes wait.

        It stays until `leave` or `remove`, whatever other processes do. Raises UserError if the disk has less
        than `bytes_needed` free, or becomes full, or if the folder belongs to somebody else.
        """
        path = self._path()
        with file_lock(path.with_suffix(".lock")):
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
        """Let other processes remove the copies."""
        if self._use is not None:
            self._use.close()
            self._use = None

    def remove(self) -> None:
        """Remove the copies, if there are any and no other process reads them; the lock files stay."""
        self.leave()
        path = self._path()
        with file_lock(path.with_suffix(".lock")), path.with_suffix(".users").open("ab") as use:
            try:
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            shutil.rmtree(path, ignore_errors=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_use": None}

    def _path(self) -> Path:
        return private_temporary_folder("flow-matching-sources", _variable()) / self._name


def _variable() -> str:
    """The environment variable that decides where the copies are."""
    return "XDG_CACHE_HOME" if os.environ.get("XDG_CACHE_HOME") else "TMPDIR"
