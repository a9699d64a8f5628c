"""Checkpoints on their way to a store, beside training.

One thread copies the newest checkpoint that waits: its files, then a reading back of each against its
SHA-256, then COMPLETE. Whatever fails is tried again until it succeeds; training goes on meanwhile. What
would stay in the store (the last ones, every M-th, the best) waits for its turn however slow the store is;
what a newer one makes superfluous does not. Only after the newest counts in the store are older ones retired.
"""

import json
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fm_core.checkpoint.format import (
    COMPLETE,
    STATE,
    Retention,
    complete_steps,
    file_sha256,
    read_state_or_default,
    remove,
    step_of,
)
from fm_core.checkpoint.train_state import TrainState, state_of
from fm_core.errors import CorruptCheckpointError, UserError
from fm_core.run.directory import step_name
from fm_core.storage.store import Store

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0


class CheckpointUploader:
    """The thread that copies checkpoints, and what it has still to do."""

    def __init__(self, store: Store, folder: Path, retention: Retention) -> None:
        self.store, self.folder, self.retention = store, folder, retention
        self._change = threading.Condition()
        self._waiting: list[int] = []
        """Ascending."""
        self._working: int | None = None
        self._newest: int | None = None
        """What this session has written or found last; a later one, anywhere, was found damaged."""
        self._copied: set[int] = set()
        self._stored: list[TrainState] = []
        """What the store holds, as far as it was seen."""
        self._problem: str | None = None
        self._thread: threading.Thread | None = None

    def add(self, step: int) -> None:
        """Have a new local, complete checkpoint copied; those that then need not stay no longer wait."""
        with self._change:
            self._newest = step
            self._copied.discard(step)
            self._wait_for_turn(step)
        self._tidy()

    def catch_up(self, steps: Iterable[int], newest: int | None = None) -> None:
        """Have copied what an earlier session could not; `newest` is where training goes on, if it does."""
        left = set(steps)
        with self._change:
            self._newest = newest
            if newest is not None:
                self._copied.add(newest)
            self._copied -= left
            self._wait_for_turn(*left)

    def wait(self, seconds: float) -> str | None:
        """Wait until nothing is left to do, at most so long; what is in the way, or None."""
        with self._change:
            done = self._change.wait_for(lambda: not self._waiting and self._working is None, seconds)
            return None if done else self._problem or "the upload takes longer"

    def _wait_for_turn(self, *steps: int) -> None:
        """Queue these beside those that wait, as far as they are to stay; called with the lock held."""
        newest = self._newest
        here = [read_state_or_default(self.folder, step) for step in complete_steps(self.folder)]
        known = {state.step: state for state in (*self._stored, *here)}
        kept = self.retention.kept([one for one in known.values() if newest is None or one.step <= newest])
        self._waiting = sorted({*self._waiting, *steps} & kept)
        if self._waiting and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._waiting))
                # The newest first: the others are worth less the longer the store is slow.
                self._working = step = self._waiting.pop()
            finished = self._copy(step)
            with self._change:
                self._working = self._problem = None
                if not finished:
                    self._wait_for_turn(step)
                self._change.notify_all()

    def _copy(self, step: int) -> bool:
        """Copy a checkpoint, however often it takes; False where a newer one came before it was done."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                upload_checkpoint(self.store, self.folder, step)
                self._copied.add(step)
                self._retire()
                return True
            except Exception as error:
                self._problem = " ".join(str(error).split()) or type(error).__name__
                here = self.folder / step_name(step) / COMPLETE
                if isinstance(error, CorruptCheckpointError) or not here.exists():
                    print(f"warning: {self._problem}; it is not copied to {self.store.url}", flush=True)
                    return True
                print(f"warning: {self._problem}; the upload is tried again in {pause:g} s", flush=True)
            with self._change:
                if self._change.wait_for(lambda: any(other > step for other in self._waiting), pause):
                    return False
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _retire(self) -> None:
        """Once the newest is in the store, remove there what need not stay; then here."""
        newest = self._newest
        if newest in self._copied:
            try:
                self._stored = retain_remote(self.store, self.retention, newest)
            except (OSError, UserError) as error:
                print(f"warning: old checkpoints stay in {self.store.url}: {error}", flush=True)
        self._tidy()

    def _tidy(self) -> None:
        """Free the local space of older checkpoints: a store that is away for days must not fill the disk."""
        with self._change:
            newest = self._newest
            if newest is None:
                return
            older = [step for step in complete_steps(self.folder) if step < newest]
            needed: set[int | None] = {*self._waiting, *([] if newest in self._copied else older[-1:])}
            needed |= {self._working} - self._copied
            for step in older:
                if step not in needed:
                    with suppress(OSError):
                        remove(self.folder / step_name(step))


def upload_checkpoint(store: Store, folder: Path, step: int) -> None:
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
            if file_sha256(folder / name / file) != facts["sha256"]:
                raise CorruptCheckpointError(f"{folder / name / file} differs from its SHA-256")
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


def retain_remote(store: Store, retention: Retention, newest: int) -> list[TrainState]:
    """Remove all but those complete checkpoints, up to `newest`, that are to stay; return them."""
    states = [_remote_state(store, step) for step in remote_steps(store) if step <= newest]
    steps = retention.kept(states)
    kept = {step_name(step) for step in steps}
    for name in store.folders():
        if name.startswith("step-") and name not in kept:
            # COMPLETE goes first: a removal that is cut short leaves nothing that counts.
            store.remove(f"{name}/{COMPLETE}")
            store.remove_folder(name)
    return [state for state in states if state.step in steps]


def _remote_state(store: Store, step: int) -> TrainState:
    where = f"{step_name(step)}/{STATE}"
    try:
        return state_of(json.loads(store.read_bytes(where)), where)
    except (FileNotFoundError, ValueError, UserError):
        return TrainState(step=step)
