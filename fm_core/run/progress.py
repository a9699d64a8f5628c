"""Progress of a stage, as passed to its observers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a stage at one moment."""

    stage: str
    """shard, train, sample, evaluate or report."""
    done: int
    """Units finished, including those of earlier sessions."""
    total: int
    """Total number of units."""
    unit: str
    """Unit of the counts, e.g. "images"."""
    message: str = ""
    """Shown next to the bar, e.g. "step 120, loss 0.31"."""
    rate: float | None = None
    """Units per second, if known."""

    @property
    def fraction(self) -> float:
        """Finished share of the work, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0

    @property
    def eta(self) -> float | None:
        """Seconds left at the current rate, if known."""
        return (self.total - self.done) / self.rate if self.rate else None


Observer = Callable[[Progress], None]


def no_progress(progress: Progress) -> None:
    """Observer that ignores progress."""


class RateMeter:
    """Units per second since the first report."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def rate(self, done: int) -> float | None:
        """Average rate up to `done` units; None until there is progress."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
            return None
        start, count = self._first
        return (done - count) / (now - start) if done > count and now > start else None


class ProgressPhases:
    """Progress over several phases as one share of all work, so that a bar never moves back or ends early.

    `weights` holds the approximate share of time of each phase, in order.
    """

    def __init__(self, stage: str, observe: Observer, weights: Mapping[str, float]) -> None:
        self._stage, self._observe = stage, observe
        total = sum(weights.values())
        self._shares: dict[str, tuple[float, float]] = {}
        before = 0.0
        for phase, weight in weights.items():
            self._shares[phase] = (before / total, weight / total)
            before += weight
        self._rate = RateMeter()

    def at(self, phase: str, done: int, total: int, unit: str) -> None:
        """Report that `done` of `total` units of a phase are finished."""
        before, share = self._shares[phase]
        # The last percent is reported by the caller, at the end of the stage.
        percent = min(99, int(100 * (before + share * done / max(1, total))))
        message = f"{phase}, {done:,}/{total:,} {unit}"
        self._observe(Progress(self._stage, percent, 100, "%", message, self._rate.rate(percent)))


def three_digits(value: float) -> str:
    """Format with three significant digits and all digits before the point: 0.4, 12.3, 1,234."""
    return f"{value:,.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def byte_size(size: float) -> str:
    """Format a number of bytes with three digits and a unit: 0 bytes, 812 kB, 12.3 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{three_digits(size / scale)} {unit}"
    return f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    """Format a duration with at most two units, e.g. "4 h 10 min"."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 48 * 3600:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"
