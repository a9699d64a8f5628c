"""Checkpoints on their way to a store, beside training.

One thread copies the newest checkpoint that waits: its files, then a reading back of each against its
SHA-256, then COMPLETE. Whatever fails is tried again until it succeeds; training goes on meanwhile. Only
after a checkpoint counts in the store are older ones retired there and here.
"""

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from fm_core.data.store import Store
from fm_core.errors import UserError
from fm_core.run.directory import step_name
from fm_core.training.committed import COMPLETE, STATE, Retention, complete_steps, remove, step_of
from fm_core.training.state import TrainState, state_of

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0


class Uploads:
    """The thread that copies checkpoints, and what it has still to do."""

    def __init__(self, store: Store, folder: Path, retention: Retention) -> None:
        self.store, self.folder, self.retention = store, folder, retention
        self._all = retention.last is None
        self._change = threading.Condition()
        self._waiting: list[int] = []
        self._working: int | None = None
        self._problem: str | None = None
        self._thread: threading.Thread | None = None

    def add(self, step: int) -> None:
        """Have a local, complete checkpoint copied; unless all stay, it takes the place of one that waits."""
        with self._change:
            self._waiting = [*self._waiting, step] if self._all else [step]
            self._change.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
        for older in [] if self._all else complete_steps(self.folder)[:-2]:
            # A store that is out of reach for days must not fill the disk.
            if older not in (step, self._working):
                self._discard(older)

    def settle(self, seconds: float) -> str | None:
        """Wait until nothing is left to do, at most so long; what is in the way, or None."""
        with self._change:
            done = self._change.wait_for(lambda: not self._waiting and self._working is None, seconds)
            return None if done else self._problem or "the upload takes longer"

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._waiting))
                self._working = step = self._waiting.pop(0)
            self._until_done(step)
            with self._change:
                self._working = self._problem = None
                self._change.notify_all()

    def _until_done(self, step: int) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                copy(self.store, self.folder, step)
                self._retire(step)
                return
            except Exception as error:
                self._problem = " ".join(str(error).split()) or type(error).__name__
                print(f"warning: {self._problem}; the upload is tried again in {pause:g} s", flush=True)
            with self._change:
                newer = self._change.wait_for(lambda: bool(self._waiting) and not self._all, pause)
            if newer:
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _retire(self, newest: int) -> None:
        try:
            retain_remote(self.store, self.retention, newest)
        except (OSError, UserError) as error:
            print(f"warning: old checkpoints stay in {self.store.url}: {error}", flush=True)
        for step in complete_steps(self.folder):
            if step < newest:
                self._discard(step)

    def _discard(self, step: int) -> None:
        """Free the local space of a checkpoint."""
        with suppress(OSError):
            remove(self.folder / step_name(step))


def copy(store: Store, folder: Path, step: int) -> None:
    """Copy a complete checkpoint to a store: files, then their reading back, then COMPLETE.

    Raises OSError or UserError when the store fails; what it holds then does not count.
    """
    name = step_name(step)
    content = (folder / name / COMPLETE).read_bytes()
    files = json.loads(content)["files"]
    if store.size(f"{name}/{COMPLETE}") is not None:
        store.remove(f"{name}/{COMPLETE}")
    for file in files:
        store.send(folder / name / file, f"{name}/{file}")
    for file, facts in files.items():
        if store.sha256(f"{name}/{file}") != facts["sha256"]:
            raise OSError(f"{store.url}/{name}/{file} is not what was sent")
    store.write_bytes(f"{name}/{COMPLETE}", content)


def remote_steps(store: Store) -> list[int]:
    """Steps of the checkpoints in a store that carry COMPLETE, oldest first."""
    names = [name for name in store.folders() if name.startswith("step-")]
    return sorted(step_of(name) for name in names if store.size(f"{name}/{COMPLETE}") is not None)


def remote_files(store: Store, name: str) -> dict[str, dict[str, Any]] | None:
    """Size and SHA-256 of the files that a checkpoint's COMPLETE names; None if it cannot be read."""
    try:
        return dict(json.loads(store.read_bytes(f"{name}/{COMPLETE}"))["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def retain_remote(store: Store, retention: Retention, newest: int) -> None:
    """Remove from a store incomplete checkpoints, and complete ones that need not stay, up to `newest`."""
    steps = [step for step in remote_steps(store) if step <= newest]
    kept = {step_name(step) for step in retention.kept([_remote_state(store, step) for step in steps])}
    for name in store.folders():
        if name.startswith("step-") and name not in kept:
            # COMPLETE goes first: a removal that is cut short leaves nothing that counts.
            store.remove(f"{name}/{COMPLETE}")
            store.remove_folder(name)


def _remote_state(store: Store, step: int) -> TrainState:
    where = f"{step_name(step)}/{STATE}"
    try:
        return state_of(json.loads(store.read_bytes(where)), where)
    except (FileNotFoundError, ValueError, UserError):
        return TrainState(step=step)
