"""Checkpoint upload to a store, in a background thread of training.

The thread copies the newest queued checkpoint: upload its files, read each back and compare its SHA-256,
upload COMPLETE. Nothing is overwritten: objects are created exclusively, so that a job that was frozen and
lost its lease changes nothing that its successor has uploaded. Failures are retried until they succeed while
training continues. A checkpoint that is to be kept in the store (the last ones, every M-th, the best) is
uploaded however slow the store is; one that a newer checkpoint makes superfluous is skipped. Old checkpoints
are removed only after the newest is valid in the store.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from fm_core.checkpoint.format import (
    COMPLETE,
    complete_steps,
    is_complete,
    read_state_or_default,
    recorded_files,
    recorded_origin,
    stored_files,
)
from fm_core.checkpoint.ownership import WriteAccess, local_access
from fm_core.checkpoint.remote_removal import RemoteRemoval
from fm_core.checkpoint.retention import Retention, proof_problem, retain_remote, superfluous_staged
from fm_core.checkpoint.set_aside import remove_checkpoint
from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import (
    CorruptCheckpointError,
    DamagedRecordError,
    ForeignCheckpointsError,
    LeaseLostError,
    UserError,
)
from fm_core.run.directory import step_name
from fm_core.storage.hashing import sha256_file
from fm_core.storage.store import Store

LOG = logging.getLogger(__name__)
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0


class CheckpointUploader:
    """The thread that uploads checkpoints, and its queue."""

    def __init__(
        self, store: Store, folder: Path, retention: Retention, access: WriteAccess | None = None
    ) -> None:
        self.store, self.folder, self.retention = store, folder, retention
        self.access = access or WriteAccess(store)
        self.refusal: LeaseLostError | ForeignCheckpointsError | None = None
        """Why this job may no longer write there: another job or run owns the place."""
        self.damaged: dict[int, str] = {}
        """Checkpoints in the store that were found damaged: the problem by step."""
        self._change = threading.Condition()
        self._waiting: list[int] = []
        """Ascending."""
        self._copying: int | None = None
        self._newest: int | None = None
        """The last step this session wrote or resumed from; later ones, anywhere, were found damaged."""
        self._copied: set[int] = set()
        self._stored: list[TrainState] = []
        """States of the checkpoints in the store when it was last listed."""
        self._problem: str | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, step: int) -> None:
        """Queue a new complete checkpoint; remove those from the queue that it makes superfluous."""
        with self._change:
            self._newest = step
            self._copied.discard(step)
            self._enqueue(step)
        self._free_staging()

    def catch_up(self, steps: Iterable[int], newest: int | None = None) -> None:
        """Queue what an earlier session could not upload; `newest` is the step that training resumes from."""
        missing = set(steps)
        with self._change:
            self._newest = newest
            if newest is not None:
                self._copied.add(newest)
            self._copied -= missing
            self._enqueue(*missing)

    def wait(self, seconds: float) -> str | None:
        """Wait at most `seconds` until nothing is left to upload; return why something is, or None.

        Raises LeaseLostError or ForeignCheckpointsError if nothing more may be uploaded.
        """
        with self._change:
            done = self._change.wait_for(lambda: not self._waiting and self._copying is None, seconds)
            if self.refusal:
                raise self.refusal
            return None if done else self._problem or f"still uploading after {seconds:g} s"

    def close(self) -> None:
        """Start no further upload or removal; an upload in progress is completed."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def _refuse(self, error: LeaseLostError | ForeignCheckpointsError) -> None:
        """Upload nothing more; training ends with this error at its next checkpoint."""
        with self._change:
            self.refusal = error
            self._closed = True
            self._waiting.clear()

    def _enqueue(self, *steps: int) -> None:
        """Add these to the queue if they are to be kept; called with the lock held."""
        newest = self._newest
        staged = [read_state_or_default(self.folder, step) for step in complete_steps(self.folder)]
        known = {state.step: state for state in (*self._stored, *staged)}
        retained = self.retention.retained(
            [state for state in known.values() if newest is None or state.step <= newest]
        )
        self._waiting = sorted({*self._waiting, *steps} & retained)
        if self._waiting and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                # The newest first, because the slower the store is, the less the others are worth.
                self._copying = step = self._waiting.pop()
            finished = self._copy(step)
            with self._change:
                self._copying = self._problem = None
                if not finished:
                    self._enqueue(step)
                self._change.notify_all()

    def _copy(self, step: int) -> bool:
        """Upload a checkpoint with retries; False if a newer one was queued before it finished."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                self.access.claim()
                upload_checkpoint(self.store, self.folder, step, self.access, self.damaged)
                self.damaged.pop(step, None)
                self._copied.add(step)
                if not self._closed:
                    self._retire()
                return True
            except Exception as error:
                self._problem = " ".join(str(error).split()) or type(error).__name__
                if isinstance(error, LeaseLostError | ForeignCheckpointsError):
                    self._refuse(error)
                    return True
                complete = is_complete(self.folder / step_name(step))
                if isinstance(error, CorruptCheckpointError) or not complete:
                    LOG.warning("%s; it is not uploaded to %s", self._problem, self.store.url)
                    return True
                LOG.warning("%s; retrying the upload in %g s", self._problem, pause)
            with self._change:
                newer = self._change.wait_for(
                    lambda: self._closed or any(other > step for other in self._waiting), pause
                )
                if newer:
                    return False
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _retire(self) -> None:
        """Once the newest is in the store, remove superfluous ones there; then free the staging folder."""
        newest = self._newest
        if newest in self._copied:
            try:
                self._stored = retain_remote(self.store, self.retention, newest, self.access, self.damaged)
            except (OSError, UserError) as error:
                LOG.warning("cannot remove old checkpoints in %s: %s", self.store.url, error)
        self._free_staging()

    def _free_staging(self) -> None:
        """Remove older staged checkpoints, so that a store that is down for days does not fill the disk."""
        with self._change:
            newest = self._newest
            if newest is None:
                return
            steps = complete_steps(self.folder)
            for step in superfluous_staged(steps, newest, self._waiting, self._copying, self._copied):
                path = self.folder / step_name(step)
                with suppress(OSError):
                    if proof_problem(path, self.access.identity) is None:
                        remove_checkpoint(path, local_access(self.folder, self.access))


def upload_checkpoint(
    store: Store,
    folder: Path,
    step: int,
    access: WriteAccess | None = None,
    damaged: Mapping[int, str] = {},
) -> None:
    """Copy a complete checkpoint to a store: upload files, read them back, upload COMPLETE.

    `damaged` are checkpoints that this job found damaged in the store. An existing one of this step is set
    aside there.

    Raises CorruptCheckpointError if a local file differs from its SHA-256 or the checkpoint belongs to
    another run, LeaseLostError if another job has taken over, OSError or UserError if the store fails; the
    copy is then invalid.
    """
    access = access or WriteAccess(store)
    name = step_name(step)
    content = (folder / name / COMPLETE).read_bytes()
    files = recorded_files(folder / name) or {}
    if access.identity and not access.identity.is_of(recorded_origin(folder / name)):
        raise CorruptCheckpointError(f"{folder / name} is of another run; check train.checkpoint_staging")
    reason = damaged.get(step)
    try:
        stored = stored_files(store, name)
    except DamagedRecordError as error:
        stored, reason = {}, str(error)
    if stored is None and store.size(f"{name}/{COMPLETE}") is not None:
        stored, reason = {}, reason or f"{store.url}/{name}/{COMPLETE} cannot be read"
    if stored == files and not reason:
        return
    if stored is not None:
        reason = reason or f"{store.url}/{name} is another checkpoint of that step"
        RemoteRemoval(store, access).set_aside(name, reason)
    for file, facts in files.items():
        access.check()
        _send(store, folder / name / file, f"{name}/{file}", facts["sha256"], access)
    access.check()
    if not store.create(f"{name}/{COMPLETE}", content):
        access.check()
        raise OSError(f"{store.url}/{name}/{COMPLETE} was written by another job meanwhile")


def _send(store: Store, source: Path, name: str, digest: str, access: WriteAccess) -> None:
    """Upload a file; the remains of an interrupted upload under its name are replaced."""
    try:
        store.send_new(source, name, digest)
    except FileExistsError:
        if sha256_file(source) != digest:
            raise CorruptCheckpointError(f"{source} differs from its SHA-256") from None
        access.check()
        store.remove(name)
        store.send_new(source, name, digest)
