"""One episode: a run from its first step to its last, with its faults, its operator and its checks."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from infra.chaos_faults.checkpoint_watch import FolderWatch, RetentionWatch
from infra.chaos_faults.context import ActiveFault, EpisodeContext, FaultKind, NotNowError
from infra.chaos_faults.invariants import final_problems
from infra.chaos_faults.tiny_training import KEPT, TinyTraining, TrainingStart

POLL_SECONDS = 0.1
LONGEST_SECONDS = 3600.0
"""Time limit of an episode in seconds; exceeding it is a violation."""
PATIENCE_SECONDS = 300.0
"""Seconds that a fault waits for its condition, mostly some progress, before the next kind is tried."""
EXPLAINED_SECONDS = 60.0
"""Seconds after the end of a fault during which it may still cause a start to fail."""
QUIET_SECONDS = 20.0
MOST_STARTS = 80
END_SECONDS = 120.0
"""Seconds in which the processes of a complete run must end."""


@dataclass
class EpisodeResult:
    """Result of an episode."""

    number: int
    seed: int
    place: str
    """Where checkpoints were: folder or store."""
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    ends: list[dict[str, Any]] = field(default_factory=list)
    """Every start that ended, with its status."""
    violations: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    checkpoints_completed: int = 0
    checkpoints_removed: int = 0
    kept: str | None = None
    """Directory with the kept files if there are violations."""


class Episode:
    """Runs one episode."""

    def __init__(
        self,
        result: EpisodeResult,
        context: EpisodeContext,
        reference: TinyTraining,
        draw: Callable[[], FaultKind | None],
        put_back: Callable[[FaultKind], None],
        deadline: float,
    ) -> None:
        """No fault is injected after `deadline` (monotonic); the run is only completed then.

        `draw` returns the next kind of fault, or None if no more are needed.
        """
        self.result, self.context, self.reference = result, context, reference
        self._draw, self._put_back, self._deadline = draw, put_back, deadline
        self.rng = Random(f"{result.seed}/{result.number}")
        self.active: list[ActiveFault] = []
        self._kinds: dict[int, FaultKind] = {}
        self.counts: Counter[str] = Counter()
        self._next: FaultKind | None = None
        self._next_at = self._waiting_since = 0.0
        self._wanted_lines = 0
        self._ended: set[int] = set()
        self._start_at: float | None = 0.0
        self._last_fault_at = float("-inf")
        self._complete = False
        self._timeline = context.training.folder / "timeline.jsonl"
        self._began = time.monotonic()

    def run(self) -> EpisodeResult:
        """Run the episode to its end and check the invariants."""
        folder_watch = FolderWatch(self._checkpoints(), KEPT) if self.context.checkpoint_disk else None
        try:
            self._disturb()
        finally:
            for fault in list(self.active):
                self._heal(fault)
            self._finish()
        watches = [folder_watch.close()] if folder_watch else []
        if self.context.store:
            watches.append(self.context.store.watched(KEPT))
        self._check_invariants(watches)
        self.result.seconds = round(time.monotonic() - self._began, 1)
        self.result.faults = dict(self.counts)
        return self.result

    def _disturb(self) -> None:
        self._plan()
        while True:
            now = time.monotonic()
            self._look_at_starts()
            if self._complete:
                return
            if now - self._began > LONGEST_SECONDS:
                self.result.violations.append(f"the run has not come to its end in {LONGEST_SECONDS:g} s")
                return
            if len(self.context.training.starts) > MOST_STARTS:
                self.result.violations.append(f"{MOST_STARTS} starts were not enough")
                return
            for fault in [fault for fault in self.active if fault.due()]:
                self._heal(fault)
            self._operate(now)
            if not any(fault.exclusive for fault in self.active):
                self._inject(now)
            time.sleep(POLL_SECONDS)

    def _operate(self, now: float) -> None:
        """Act as the operator: start the same command again once nothing runs."""
        if self.context.training.alive() or any(fault.exclusive for fault in self.active):
            self._start_at = None
            return
        if self._start_at is None:
            self._start_at = now + self.rng.choice((0.0, 0.5, 3.0))
        if now >= self._start_at:
            start = self.context.start()
            self._start_at = None
            self._log_event("start", number=start.number, host="other" if self.context.host else "first")

    def _look_at_starts(self) -> None:
        for start in self.context.training.starts:
            start.disturbed = start.disturbed or bool(self.active)
            code = start.process.poll()
            if code is None or start.number in self._ended:
                continue
            self._ended.add(start.number)
            end = {
                "start": start.number,
                "code": code,
                "seconds": round(time.monotonic() - start.began, 1),
                "last line": start.last_line[:600],
                "active": [f"{fault.kind} ({fault.detail})" for fault in self.active],
                "disturbed": self._is_disturbed(start),
            }
            self.result.ends.append(end)
            self._log_event("end", **end)
            self._complete = self._complete or code == 0
            if code not in (0, 3) and not end["disturbed"]:
                self.result.violations.append(
                    f"start {start.number} ended with status {code} although nothing was injected since "
                    f"{EXPLAINED_SECONDS:g} s before it began: {start.last_line[:300]}"
                )

    def _is_disturbed(self, start: TrainingStart) -> bool:
        return start.disturbed or self._last_fault_at > start.began - EXPLAINED_SECONDS

    def _plan(self) -> None:
        """Choose the next kind of fault and its time: immediately, or after some lines of metrics."""
        self._next = self._draw()
        now = time.monotonic()
        self._next_at = now + self.rng.choice((0.1, 0.5, 1.5, 4.0))
        self._waiting_since = self._next_at
        self._wanted_lines = self.context.lines() + self.rng.choice((-10000, 1, 2, 4, 8))

    def _inject(self, now: float) -> None:
        kind = self._next
        if kind is None or now < self._next_at or now > self._deadline:
            return
        waited = now - self._waiting_since
        if self._conflicts(kind) or (self.context.lines() < self._wanted_lines and waited < PATIENCE_SECONDS):
            return
        try:
            fault = kind.inject(self.context, self.rng)
        except NotNowError as reason:
            if waited > PATIENCE_SECONDS:
                self._log_event("postponed", kind=kind.name, reason=str(reason))
                self._put_back(kind)
                self._plan()
            return
        self._last_fault_at = now
        self.active.append(fault)
        self._kinds[id(fault)] = kind
        self._log_event("fault", kind=fault.kind, detail=fault.detail, lines=self.context.lines())
        if fault.due():
            self._heal(fault)
        self._plan()

    def _conflicts(self, kind: FaultKind) -> bool:
        """Whether a fault of that kind, or of the same store, is still active."""
        others = [self._kinds[id(fault)] for fault in self.active]
        return any(other.name == kind.name or "store" in other.needs & kind.needs for other in others) or (
            bool(self.active) and kind.name == "freeze beyond the lease"
        )

    def _heal(self, fault: ActiveFault) -> None:
        for start in self.context.training.starts:
            start.disturbed = start.disturbed or start.number not in self._ended
        fault.heal()
        self.active.remove(fault)
        self._last_fault_at = time.monotonic()
        if fault.exclusive:  # observe its consequences before anything else happens
            self._next_at = max(self._next_at, self._last_fault_at + QUIET_SECONDS)
        occurred = fault.occurred()
        self._log_event("over", kind=fault.kind, occurred=occurred)
        if occurred:
            self.counts[fault.kind] += 1
        else:
            self._put_back(self._kinds[id(fault)])

    def _finish(self) -> None:
        """Wait until every process of the complete run has ended; kill those that have not."""
        deadline = time.monotonic() + END_SECONDS
        while (left := self.context.training.processes()) and self._complete and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if left and self._complete:
            names = ", ".join(f"{member.role} ({member.process.pid})" for member in left)
            self.result.violations.append(f"still alive {END_SECONDS:g} s after the end: {names}")
        for member in left:
            member.process.kill()
        self._look_at_starts()

    def _check_invariants(self, watches: list[RetentionWatch]) -> None:
        result, run = self.result, self.context.run_disk.backing
        for watch in watches:
            result.violations += watch.problems
            result.remarks += watch.set_aside
            result.checkpoints_completed += watch.completed
            result.checkpoints_removed += watch.removed
        checkpoints = self._checkpoints()
        if self.context.store:
            self.context.store.ask(f"dump {self.context.training.folder / 'objects'}")
        reference = self.reference.path
        result.violations += final_problems(run, checkpoints, reference, reference / "train" / "checkpoints")

    def _checkpoints(self) -> Path:
        disk = self.context.checkpoint_disk
        return disk.backing if disk else self.context.training.folder / "objects" / "checkpoints"

    def _log_event(self, event: str, **facts: Any) -> None:
        record = {"seconds": round(time.monotonic() - self._began, 2), "event": event, **facts}
        with self._timeline.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def keep(context: EpisodeContext, target: Path, everything: bool) -> None:
    """Keep the timeline and the logs of an episode, or all of its files."""
    target.mkdir(parents=True, exist_ok=True)
    for path in context.training.folder.glob("*"):
        if path.is_file():
            shutil.copy2(path, target / path.name)
    places = {"logs": context.run_disk.backing / "logs"}
    if everything:
        places |= {"run": context.run_disk.backing, "objects": context.training.folder / "objects"}
    if everything and context.checkpoint_disk:
        places["checkpoints"] = context.checkpoint_disk.backing
    for name, place in places.items():
        if place.exists():
            shutil.copytree(place, target / name, dirs_exist_ok=True)


def as_record(result: EpisodeResult) -> dict[str, Any]:
    """The result as JSON."""
    return asdict(result)
