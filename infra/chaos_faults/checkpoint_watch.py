"""Watches the checkpoints of a run: complete ones may be deleted only according to the retention rule."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

NAME = re.compile(r"step-(\d+)")
RENAMED = re.compile(r"(?P<kind>\.removing|\.writing|\.fetching|set-aside)-step-(?P<step>\d+)\.")
INTERVAL_SECONDS = 0.1
ATTEMPTS = 5


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A checkpoint that was complete when it was observed."""

    fingerprint: str
    loss: float | None
    """Its validation loss."""


@dataclass
class Snapshot:
    """The complete checkpoints of a place at one moment."""

    present: dict[int, CompleteCheckpoint] = field(default_factory=dict)
    """By step."""
    removing: set[str] = field(default_factory=set)
    """Fingerprints of those that are renamed for a removal, which may be undone."""
    aside: set[str] = field(default_factory=set)
    """Fingerprints of those that were set aside."""


class RetentionWatch:
    """Checks every checkpoint that disappears between two snapshots."""

    def __init__(self, retained: int) -> None:
        """`retained`: number of newest checkpoints that must be kept, besides the best."""
        self.retained = retained
        self.problems: list[str] = []
        self.set_aside: list[str] = []
        self.completed = self.removed = 0
        self._known: dict[str, tuple[int, CompleteCheckpoint]] = {}

    def observe(self, now: Snapshot) -> None:
        """Compare a snapshot with the previous one."""
        here = {checkpoint.fingerprint for checkpoint in now.present.values()}
        for fingerprint, (step, checkpoint) in list(self._known.items()):
            if fingerprint in here or fingerprint in now.removing:
                continue
            if fingerprint in now.aside:
                message = f"step {step} ({fingerprint[:8]}) was set aside"
                self.set_aside += [] if message in self.set_aside else [message]
                continue
            del self._known[fingerprint]
            self.removed += 1
            self._check_removal(step, checkpoint, now.present)
        for step, checkpoint in now.present.items():
            if checkpoint.fingerprint not in self._known:
                self._known[checkpoint.fingerprint] = (step, checkpoint)
                self.completed += 1

    def _check_removal(
        self, step: int, checkpoint: CompleteCheckpoint, present: Mapping[int, CompleteCheckpoint]
    ) -> None:
        if any(f"({checkpoint.fingerprint[:8]}) was set aside" in message for message in self.set_aside):
            self.problems.append(f"checkpoint {step} was deleted after it was set aside")
            return
        newer = [other for other in present if other > step]
        losses = [other.loss for other in present.values() if other.loss is not None]
        if len(newer) < self.retained:
            self.problems.append(
                f"checkpoint {step} was deleted while only {sorted(present)} were there "
                f"(the newest {self.retained} stay)"
            )
        elif checkpoint.loss is not None and (not losses or checkpoint.loss < min(losses)):
            self.problems.append(f"checkpoint {step}, the best (loss {checkpoint.loss}), was deleted")


class FolderWatch:
    """Watches a folder of checkpoints from a thread."""

    def __init__(self, folder: Path, retained: int) -> None:
        self.folder, self.retention = folder, RetentionWatch(retained)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> RetentionWatch:
        """End the thread after a last snapshot; return the watch."""
        self._ended.set()
        self._thread.join()
        return self.retention

    def _work(self) -> None:
        while True:
            last = self._ended.wait(INTERVAL_SECONDS)
            if snapshot := folder_snapshot(self.folder):
                self.retention.observe(snapshot)
            if last:
                return


def folder_snapshot(folder: Path) -> Snapshot | None:
    """The complete checkpoints of a folder; None if it changes during the read, or is missing."""
    for _ in range(ATTEMPTS):
        try:
            before = sorted(path.name for path in folder.iterdir())
        except OSError:
            return None
        snapshot = Snapshot()
        for name in before:
            _enter(snapshot, name, _read(folder / name))
        with suppress(OSError):
            if before == sorted(path.name for path in folder.iterdir()):
                return snapshot
    return None


def _enter(snapshot: Snapshot, name: str, checkpoint: CompleteCheckpoint | None) -> None:
    if checkpoint is None:
        return
    if match := NAME.fullmatch(name):
        snapshot.present[int(match[1])] = checkpoint
    elif match := RENAMED.match(name):
        (snapshot.aside if match["kind"] == "set-aside" else snapshot.removing).add(checkpoint.fingerprint)


def _read(folder: Path) -> CompleteCheckpoint | None:
    try:
        content = (folder / "COMPLETE").read_bytes()
        state = (folder / "state.json").read_bytes()
    except OSError:
        return None
    return complete_checkpoint(content, state)


def complete_checkpoint(content: bytes, state: bytes | None) -> CompleteCheckpoint:
    """A checkpoint by the contents of its COMPLETE and its state.json."""
    loss = None
    with suppress(ValueError):
        loss = json.loads(state or b"{}").get("held_out_loss")
    return CompleteCheckpoint(hashlib.sha256(content).hexdigest(), loss)
