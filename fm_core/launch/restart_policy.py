"""Restart policy of a job: consecutive restarts, the pauses before them, and what resets the count.

Each restart is a line of logs/restarts.jsonl. The pause doubles with each consecutive restart; new durable
progress resets the count.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fm_core.config import LaunchSection
from fm_core.errors import StopRequested
from fm_core.run.best_effort import BestEffort
from fm_core.run.stop_file import pending_request
from fm_core.storage.atomic_files import append_line

PAUSE_STEP_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True)
class Restart:
    """One restart."""

    number: int
    """Number of consecutive restarts, including this one."""
    limit: int
    """launch.restarts."""
    pause_seconds: float
    reason: str
    """The failure, in one line."""

    @property
    def message(self) -> str:
        """Progress message during the pause."""
        return f"restart {self.number} of {self.limit} in {self.pause_seconds:g} s: {self.reason}"


class RestartPolicy:
    """Counts the restarts of one job."""

    def __init__(
        self,
        stage: str,
        launch: LaunchSection,
        logs: Path,
        durable_progress: Callable[[], int],
        effort: BestEffort,
    ) -> None:
        """`durable_progress` returns the amount of durable work, in any unit."""
        self._stage, self._launch, self._logs, self._durable_progress = stage, launch, logs, durable_progress
        self._effort = effort
        self._consecutive = self._best = 0

    def next_restart(self, failure: Exception) -> Restart | None:
        """The restart after a failure, recorded in restarts.jsonl; None if the limit is reached."""
        progress = self._effort.call("see how far the stage is", self._durable_progress, self._best)
        if progress > self._best:
            self._consecutive, self._best = 0, progress
        limit = self._launch.restarts
        if self._consecutive == limit:
            return None
        pause = min(self._launch.restart_seconds * 2**self._consecutive, LONGEST_PAUSE_SECONDS)
        self._consecutive += 1
        record = {
            "stage": self._stage,
            "restart": self._consecutive,
            "of": limit,
            "pause_seconds": pause,
            "failed": time.time(),
            "because": str(failure),
        }
        file = self._logs / "restarts.jsonl"
        self._effort.call("record the restart", lambda: append_line(file, record), None)
        return Restart(self._consecutive, limit, pause, str(failure).splitlines()[0])


def pause(seconds: float, *directories: Path) -> None:
    """Wait before a restart. Raises StopRequested if there is a STOP file in one of the directories."""
    deadline = time.monotonic() + seconds
    while True:
        if pending_request(*directories):
            raise StopRequested("stopped before a restart; run it again to continue")
        if time.monotonic() >= deadline:
            return
        time.sleep(min(PAUSE_STEP_SECONDS, seconds))
