"""Removal of checkpoints in a store, which has no rename: move COMPLETE away, check the lease, delete.

The record that replaces COMPLETE contains the epoch and the job. The next job uses it to undo an interrupted
removal, or to finish it if files are already missing.

One race remains: a job that is frozen between its last check and the deletion deletes the files of that step
even if a successor has uploaded the step again in the meantime. A successor resumes from a checkpoint newer
than any that retention removes, so it reaches such a step only if all newer ones are damaged.
"""

import json
import logging
from contextlib import suppress

from fm_core.checkpoint.format import COMPLETE, files_of
from fm_core.checkpoint.ownership import WriteAccess
from fm_core.checkpoint.set_aside import ASIDE
from fm_core.errors import UserError
from fm_core.storage.store import Store

LOG = logging.getLogger(__name__)
REMOVING = f"{COMPLETE}.removing"


class RemoteRemoval:
    """Removes checkpoints of one store, or sets them aside."""

    def __init__(self, store: Store, access: WriteAccess) -> None:
        self.store, self.access = store, access

    def remove(self, name: str) -> None:
        """Remove a checkpoint that is known to be superseded; no error if it does not exist.

        Raises what `access.check` raises; the checkpoint is then unchanged.
        """
        self.access.check()
        marker = f"{name}/{REMOVING}.{self.access.tag}"
        try:
            content = self.store.read_bytes(f"{name}/{COMPLETE}")
        except FileNotFoundError:
            return
        self.store.write_bytes(marker, content)
        self.store.remove(f"{name}/{COMPLETE}")
        try:
            self.access.check()
        except BaseException:
            with suppress(OSError, UserError):
                self.store.create(f"{name}/{COMPLETE}", content)
                self.store.remove(marker)
            raise
        self._delete(name, content)

    def recover(self, name: str) -> None:
        """Undo a removal that an earlier job started, or finish it if files are already missing."""
        folder = self.store.below(name)
        sizes = folder.sizes()
        if not sizes and not self.store.filesystem.find(self.store.full(name)):
            self.store.remove_folder(name)  # an empty folder left by a removal
        markers = [file for file in sizes if file.startswith(f"{REMOVING}.") and not self._is_later(file)]
        if not markers or COMPLETE in sizes:
            return
        self.access.check()
        content = folder.read_bytes(markers[0])
        files = files_of(json.loads(content), f"{folder.url}/{markers[0]}")
        if all(folder.size(file) == facts["bytes"] for file, facts in files.items()):
            folder.create(COMPLETE, content)
            folder.remove(markers[0])
        else:
            self._delete(name, content)

    def _delete(self, name: str, content: bytes) -> None:
        """Delete a checkpoint's files, then the removal record, from which the next job can resume."""
        for file in files_of(json.loads(content), name):
            self.store.remove(f"{name}/{file}")
        self.store.remove_folder(name)

    def _is_later(self, marker: str) -> bool:
        epoch = marker.removeprefix(f"{REMOVING}.e").partition("-")[0]
        return epoch.isdecimal() and int(epoch) > self.access.fence.epoch

    def set_aside(self, name: str, reason: str) -> None:
        """Rename a damaged checkpoint to a name that is neither read nor removed by the program."""
        self.access.check()
        target = f"{ASIDE}-{name}.{self.access.tag}"
        with suppress(FileNotFoundError):
            self.store.move_folder(name, target)
            try:
                self.access.check()
            except BaseException:
                with suppress(OSError, UserError):
                    if self.store.size(f"{name}/{COMPLETE}") is None:
                        self.store.move_folder(target, name)
                raise
            LOG.warning("%s: set aside as %s, which is never removed automatically", reason, target)
