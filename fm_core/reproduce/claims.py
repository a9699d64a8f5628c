"""The paper's three claims about flow matching on the optimal-transport path, decided by measured numbers.

Lipman et al. (2023), section 6: it reaches the quality of the others with fewer evaluations of the network,
its distance falls faster while training, and its samples are better. Each may come out either way, or not
be distinguishable.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, hypot, sqrt
from statistics import fmean, stdev

DISTINGUISHABLE = 2.0
"""Differences below so many standard errors are not told from none."""
DRAWS = 1_000
"""How often the curves are drawn anew within their errors, for the range of a factor."""
RANGE = (0.16, 0.84)
"""The quantiles of a factor that are told: one standard error to either side."""


@dataclass(frozen=True)
class Measured:
    """A number with its standard error."""

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.stderr:.2g}"


@dataclass(frozen=True)
class CurvePoint:
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
    low: float | None = None
    """The factor's 16% quantile under the errors of the distances; 0 where the quality is not reached."""
    high: float | None = None
    """Its 84% quantile."""


def over_seeds(values: Sequence[Measured]) -> Measured:
    """One number of several seeds: mean and deviation over seeds; of one seed, the number as it is."""
    if len(values) == 1:
        return values[0]
    return Measured(fmean(v.value for v in values), stdev(v.value for v in values))


def mean_of_seeds(values: Sequence[Measured]) -> Measured:
    """The mean over seeds with its own standard error; of one seed, the number as it is."""
    found = over_seeds(values)
    return Measured(found.value, found.stderr / sqrt(len(values)))


def reached_at(curve: Sequence[CurvePoint], distance: float) -> float | None:
    """The smallest cost whose distance is no greater; None if none is."""
    return min((point.cost for point in curve if point.distance.value <= distance), default=None)


def compare_cost(ours: Sequence[CurvePoint], other: Sequence[CurvePoint], unit: str) -> Verdict:
    """How many times less it costs us to reach the other's best distance, its standard error granted to both.

    Costs are those that were measured, not interpolated: a factor is as coarse as the grid of costs. Its
    range comes from drawing every distance anew within its standard error (always the same draws).
    Raises ValueError without points.
    """
    target = _target(other)
    theirs, mine = reached_at(other, target), reached_at(ours, target)
    assert theirs is not None
    chance = random.Random(0)
    factors = sorted(_factor(_drawn(ours, chance), _drawn(other, chance)) for _ in range(DRAWS))
    low, high = (factors[int(quantile * DRAWS)] for quantile in RANGE)
    told = f"{_times(low)} to {_times(high)} within the errors"
    if mine is None:
        nearest = min(point.distance.value for point in ours)
        words = (
            f"its best distance ({target:.3g}) is not reached: {nearest:.3g} at the least, where it needs "
            f"{theirs:,.0f} {unit} ({told})"
        )
        if low <= 1 <= high:
            words = f"not distinguishable: {words}"
        return Verdict(None, words, low, high)
    factor = theirs / mine
    reached = f"{target:.3g} is reached at {mine:,.0f} {unit}, by the other at {theirs:,.0f} ({told})"
    word = "not distinguishable" if low <= 1 <= high else _times(factor)
    return Verdict(factor, f"{word}: {reached}", low, high)


def _target(curve: Sequence[CurvePoint]) -> float:
    best = min(curve, key=lambda point: point.distance.value).distance
    return best.value + best.stderr


def _factor(ours: Sequence[CurvePoint], other: Sequence[CurvePoint]) -> float:
    target = _target(other)
    theirs, mine = reached_at(other, target), reached_at(ours, target)
    return theirs / mine if theirs and mine else 0.0


def _drawn(curve: Sequence[CurvePoint], chance: random.Random) -> list[CurvePoint]:
    return [
        CurvePoint(
            point.cost,
            Measured(chance.gauss(point.distance.value, point.distance.stderr), point.distance.stderr),
        )
        for point in curve
    ]


def _times(factor: float) -> str:
    if factor == 0:
        return "not reached"
    if factor == 1:
        return "as many"
    return f"{factor:.2g} times fewer" if factor > 1 else f"{1 / factor:.2g} times more"


def compare_quality(ours: Measured, other: Measured) -> Verdict:
    """Whether our distance is smaller than by chance; the factor is the difference in standard errors."""
    error, difference = hypot(ours.stderr, other.stderr), other.value - ours.value
    apart = difference / error if error else copysign(float("inf"), difference) if difference else 0.0
    words = {-1: "worse", 0: "not distinguishable", 1: "better"}
    word = words[0 if abs(apart) < DISTINGUISHABLE else 1 if apart > 0 else -1]
    return Verdict(apart, f"{word}: {ours} against {other} ({apart:+.1f} standard errors)")
