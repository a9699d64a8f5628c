"""Progress bars and checks for the terminal."""

import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from fm_core.output import print_line
from fm_core.run.progress import Progress, three_digits
from fm_core.run.results import Check

LINE_SECONDS = 10.0


class ProgressBar:
    """A stage's progress: a bar with rate and ETA on a terminal, otherwise a line every ten seconds."""

    def __init__(self, live: bool = True) -> None:
        """`live` false: no bar, even on a terminal."""
        self._live = live
        self.console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._line_at = 0.0
        self._last = self._printed = ""
        self._finished: set[str] = set()

    def __enter__(self) -> Self:
        if self._live and self.console.is_terminal:
            # Messages may contain brackets, which are not markup.
            stage = TextColumn("{task.fields[stage]}", markup=False)
            columns = (stage, BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar = RichProgress(*columns, console=self.console)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            # rich raises SystemExit if its terminal or pipe is closed.
            with suppress(OSError, ValueError, SystemExit):
                self._bar.stop()
        elif self._last and self._last != self._printed:
            self._print(self._last)

    def observe(self, progress: Progress) -> None:
        """Show the current progress."""
        if self._bar:
            if self._task is None:
                self._task = self._bar.add_task("", total=1.0, stage=progress.stage)
            self._bar.update(self._task, completed=progress.fraction, description=describe(progress))
            return
        self._last = f"{progress.stage}: {describe(progress)}"
        # A stage whose count is complete may still write or upload for minutes.
        finished = progress.fraction == 1.0 and progress.stage not in self._finished
        if time.monotonic() - self._line_at > LINE_SECONDS or finished:
            self._line_at = time.monotonic()
            self._finished |= {progress.stage} if finished else set()
            self._print(self._last)

    def _print(self, line: str) -> None:
        self._printed = line
        print_line(line, sys.stderr)


def describe(progress: Progress) -> str:
    """Format counts, rate, time left and the stage's message as one line."""
    parts = [f"{progress.done:,}/{progress.total:,} {progress.unit}"]
    if progress.rate:
        parts.append(f"{three_digits(progress.rate)} {progress.unit}/s")
    if progress.eta and progress.fraction < 1:
        parts.append(f"{timedelta(seconds=round(progress.eta))} left")
    return ", ".join([*parts, progress.message] if progress.message else parts)


def show_checks(checks: Iterable[Check]) -> bool:
    """Print a line for each check as soon as it is done; returns whether all are ok."""
    all_ok = True
    for check in checks:
        print_line(f"{'ok' if check.ok else 'NO':2}  {check.name:18} {check.detail}")
        all_ok &= check.ok
    return all_ok
