"""The paper's three claims about flow matching on the optimal-transport path, decided by measured numbers.

Lipman et al. (2023), section 6: it reaches the quality of the others with fewer evaluations of the network,
its distance falls faster while training, and its samples are better. Each may come out either way, or not
be distinguishable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from statistics import fmean, stdev

DISTINGUISHABLE = 2.0
"""Differences below so many standard errors are not told from none."""


@dataclass(frozen=True)
class Measured:
    """A number with its standard error."""

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.stderr:.2g}"


@dataclass(frozen=True)
class Point:
    """A distance at some cost: evaluations of the network, or images seen."""

    cost: float
    distance: Measured


@dataclass(frozen=True)
class Verdict:
    """What a comparison with one other objective says."""

    factor: float | None
    """How many times cheaper (fewer evaluations, fewer images), or the difference in standard errors; None
    where the quality is not reached."""
    words: str


def over_seeds(values: Sequence[Measured]) -> Measured:
    """One number of several seeds: mean and deviation over seeds; of one seed, the number as it is."""
    if len(values) == 1:
        return values[0]
    return Measured(fmean(v.value for v in values), stdev(v.value for v in values))


def reached_at(curve: Sequence[Point], distance: float) -> float | None:
    """The smallest cost whose distance is no greater; None if none is."""
    return min((point.cost for point in curve if point.distance.value <= distance), default=None)


def cheaper(ours: Sequence[Point], other: Sequence[Point], unit: str) -> Verdict:
    """How many times less it costs us to reach the other's best distance, its standard error granted to both.

    Costs are those that were measured, not interpolated: a factor is as coarse as the grid of costs.
    Raises ValueError without points.
    """
    best = min(other, key=lambda point: point.distance.value).distance
    target = best.value + best.stderr
    theirs, mine = reached_at(other, target), reached_at(ours, target)
    assert theirs is not None
    if mine is None:
        nearest = min(point.distance.value for point in ours)
        return Verdict(
            None,
            f"its best distance ({best}) is not reached: {nearest:.3g} at the least, where it needs "
            f"{theirs:,.0f} {unit}",
        )
    factor = theirs / mine
    if factor == 1:
        words = f"the same: both reach {target:.3g} at {mine:,.0f} {unit} (of the costs that were tried)"
    else:
        than = f"{factor:.2g} times fewer" if factor > 1 else f"{1 / factor:.2g} times more"
        words = f"{than}: {target:.3g} is reached at {mine:,.0f} {unit}, by the other at {theirs:,.0f}"
    return Verdict(factor, words)


def better(ours: Measured, other: Measured) -> Verdict:
    """Whether our distance is smaller than by chance; the factor is the difference in standard errors."""
    error = hypot(ours.stderr, other.stderr)
    apart = (other.value - ours.value) / error if error else float("inf")
    words = {-1: "worse", 0: "not distinguishable", 1: "better"}
    word = words[0 if abs(apart) < DISTINGUISHABLE else 1 if apart > 0 else -1]
    return Verdict(apart, f"{word}: {ours} against {other} ({apart:+.1f} standard errors)")
