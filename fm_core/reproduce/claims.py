"""The paper's three claims about flow matching on the optimal-transport path, tested with measured numbers.

Lipman et al. (2023), section 6: it reaches the quality of the others with fewer evaluations of the network,
its distance falls faster during training, and its samples are better. Each claim may hold, be contradicted,
or be undecidable within the errors. Here it is the candidate, and another objective is the baseline.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, hypot, sqrt
from statistics import fmean, stdev

DISTINGUISHABLE = 2.0
"""Differences of fewer standard errors are reported as not distinguishable."""
BOOTSTRAP_DRAWS = 1_000
"""Resamples of the curves within their errors, for the range of a factor."""
RANGE = (0.16, 0.84)
"""The reported quantiles of a factor: one standard error to either side."""


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
    """The result of a comparison with one baseline."""

    factor: float | None
    """How many times cheaper the candidate is (fewer evaluations, fewer images), or the difference in
    standard errors; None where the baseline's quality is not reached."""
    text: str
    low: float | None = None
    """The factor's 16% quantile under the errors of the distances; 0 where the quality is not reached."""
    high: float | None = None
    """Its 84% quantile."""

    def record(self) -> dict[str, float | str | None]:
        """The verdict in results.json."""
        return {"factor": self.factor, "words": self.text, "low": self.low, "high": self.high}


def over_seeds(values: Sequence[Measured]) -> Measured:
    """One number of several seeds: mean and deviation over seeds; of one seed, the number as it is."""
    if len(values) == 1:
        return values[0]
    return Measured(fmean(v.value for v in values), stdev(v.value for v in values))


def mean_of_seeds(values: Sequence[Measured]) -> Measured:
    """The mean over seeds with its own standard error; of one seed, the number as it is."""
    mean = over_seeds(values)
    return Measured(mean.value, mean.stderr / sqrt(len(values)))


def reached_at(curve: Sequence[CurvePoint], distance: float) -> float | None:
    """The smallest cost whose distance is no greater; None if none is."""
    return min((point.cost for point in curve if point.distance.value <= distance), default=None)


def compare_cost(candidate: Sequence[CurvePoint], baseline: Sequence[CurvePoint], unit: str) -> Verdict:
    """How many times less it costs the candidate to reach the baseline's best distance plus its error.

    Costs are those that were measured, not interpolated: a factor is as coarse as the grid of costs. Its
    range comes from resampling every distance within its standard error (always with the same seed).

    Raises:
        ValueError: a curve has no points.
    """
    target = _target(baseline)
    baseline_cost, cost = reached_at(baseline, target), reached_at(candidate, target)
    assert baseline_cost is not None
    rng = random.Random(0)
    factors = sorted(
        _factor(_resampled(candidate, rng), _resampled(baseline, rng)) for _ in range(BOOTSTRAP_DRAWS)
    )
    low, high = (factors[int(quantile * BOOTSTRAP_DRAWS)] for quantile in RANGE)
    error_range = f"{_times_fewer(low)} to {_times_fewer(high)} within the errors"
    if cost is None:
        nearest = min(point.distance.value for point in candidate)
        text = (
            f"its best distance ({target:.3g}) is not reached: {nearest:.3g} at the least, where it needs "
            f"{baseline_cost:,.0f} {unit} ({error_range})"
        )
        if low <= 1 <= high:
            text = f"not distinguishable: {text}"
        return Verdict(None, text, low, high)
    factor = baseline_cost / cost
    costs = (
        f"{target:.3g} is reached at {cost:,.0f} {unit}, by the other at {baseline_cost:,.0f} ({error_range})"
    )
    result = "not distinguishable" if low <= 1 <= high else _times_fewer(factor)
    return Verdict(factor, f"{result}: {costs}", low, high)


def compare_quality(candidate: Measured, baseline: Measured) -> Verdict:
    """Whether the candidate's distance is significantly smaller; the factor is the difference in errors."""
    error = hypot(candidate.stderr, baseline.stderr)
    difference = baseline.value - candidate.value
    without_error = copysign(float("inf"), difference) if difference else 0.0
    deviation = difference / error if error else without_error
    result = "not distinguishable"
    if abs(deviation) >= DISTINGUISHABLE:
        result = "better" if deviation > 0 else "worse"
    return Verdict(deviation, f"{result}: {candidate} against {baseline} ({deviation:+.1f} standard errors)")


def _target(curve: Sequence[CurvePoint]) -> float:
    """The best distance of a curve plus its standard error."""
    best = min(curve, key=lambda point: point.distance.value).distance
    return best.value + best.stderr


def _factor(candidate: Sequence[CurvePoint], baseline: Sequence[CurvePoint]) -> float:
    """How many times less the candidate costs; 0 where it does not reach the baseline's target."""
    target = _target(baseline)
    baseline_cost, cost = reached_at(baseline, target), reached_at(candidate, target)
    return baseline_cost / cost if baseline_cost and cost else 0.0


def _resampled(curve: Sequence[CurvePoint], rng: random.Random) -> list[CurvePoint]:
    return [
        CurvePoint(
            point.cost,
            Measured(rng.gauss(point.distance.value, point.distance.stderr), point.distance.stderr),
        )
        for point in curve
    ]


def _times_fewer(factor: float) -> str:
    if factor == 0:
        return "not reached"
    if factor == 1:
        return "as many"
    return f"{factor:.2g} times fewer" if factor > 1 else f"{1 / factor:.2g} times more"
