"""What a stage tells whoever watches it."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a stage is."""

    stage: str
    """shard, train, sample, evaluate or report."""
    done: int
    """Units finished, those of earlier sessions included."""
    total: int
    """Units there are."""
    unit: str
    """What is counted, e.g. "images"."""
    message: str = ""
    """What an observer reads beside the bar, e.g. "step 120, loss 0.31"."""
    rate: float | None = None
    """Units per second, where known."""

    @property
    def fraction(self) -> float:
        """Share that is finished, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0

    @property
    def eta(self) -> float | None:
        """Seconds left at the present rate, where known."""
        return (self.total - self.done) / self.rate if self.rate else None


Observer = Callable[[Progress], None]


def no_progress(progress: Progress) -> None:
    """Observer for when nobody watches."""


class RateMeter:
    """Units per second since the first report."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def rate(self, done: int) -> float | None:
        """Rate at `done` units; None until something moved."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
            return None
        start, count = self._first
        return (done - count) / (now - start) if done > count and now > start else None


def three_digits(value: float) -> str:
    """Three significant digits, and all of those before the point: 0.4, 12.3, 1,234."""
    return f"{value:,.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
