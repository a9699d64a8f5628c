"""One bar over parts of a stage that count different things."""

from collections.abc import Mapping

from fm_core.run.progress import Observer, Progress, RateMeter


class ProgressPhases:
    """Reports the share of the whole work that is done, so that a bar never runs back or ends early.

    `weights` holds, for each phase in order, about how much of the time it takes.
    """

    def __init__(self, stage: str, observe: Observer, weights: Mapping[str, float]) -> None:
        self._stage, self._observe = stage, observe
        whole = sum(weights.values())
        self._shares: dict[str, tuple[float, float]] = {}
        before = 0.0
        for phase, weight in weights.items():
            self._shares[phase] = (before / whole, weight / whole)
            before += weight
        self._pace = RateMeter()

    def at(self, phase: str, done: int, total: int, unit: str) -> None:
        """Say that `done` of `total` units of a phase are finished."""
        before, share = self._shares[phase]
        # The last percent is the end of the stage, which its caller reports.
        percent = min(99, int(100 * (before + share * done / max(1, total))))
        message = f"{phase}, {done:,}/{total:,} {unit}"
        self._observe(Progress(self._stage, percent, 100, "%", message, self._pace.rate(percent)))
