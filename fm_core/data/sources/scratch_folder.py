"""Local copies of a source that cannot be read in a random order: made once per node, removed afterwards."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fm_core.errors import UserError
from fm_core.storage.file_lock import file_lock
from fm_core.storage.hashing import sha256_bytes

COMPLETE = "ready"
"""File that is written when the copies are complete."""


class ScratchFolder:
    """A folder under TMPDIR, shared by the processes of a node that read the same source."""

    def __init__(self, identity: str) -> None:
        """identity: text that differs for other content."""
        base = Path(tempfile.gettempdir()) / f"flow-matching-sources-{os.getuid()}"
        self.path = base / sha256_bytes(identity.encode())[:24]

    def fill(self, make: Callable[[Path], None], bytes_needed: int) -> Path:
        """The folder, filled by `make` unless that was done before; other processes wait.

        Raises UserError if the disk has less than `bytes_needed` free, or becomes full.
        """
        with file_lock(self.path.with_suffix(".lock")):
            if (self.path / COMPLETE).exists():
                return self.path
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            free = shutil.disk_usage(self.path).free
            if free < bytes_needed:
                raise UserError(
                    f"{self.path.parent}: {free / 1e9:.1f} GB free, a temporary copy of the source needs "
                    f"{bytes_needed / 1e9:.1f} GB; set TMPDIR to a larger disk"
                )
            try:
                make(self.path)
                (self.path / COMPLETE).touch()
            except OSError as error:
                shutil.rmtree(self.path, ignore_errors=True)
                raise UserError(
                    f"{self.path}: cannot write ({error.strerror or error}); set TMPDIR"
                ) from None
        return self.path

    def remove(self) -> None:
        """Remove the copies, if there are any; the lock file stays."""
        shutil.rmtree(self.path, ignore_errors=True)
