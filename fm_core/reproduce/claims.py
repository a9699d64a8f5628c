"""The paper's three claims about flow matching on the optimal-transport path, tested with measured numbers.

Lipman et al. (2023), section 6, claim that it reaches the quality of the other objectives with fewer network
evaluations, that its distance falls faster during training, and that its samples are better. Each claim may
hold, be contradicted, or be undecidable within the errors. In this module flow matching on the
optimal-transport path is the candidate, and another objective is the baseline.

Verdicts about training need several seeds, whose deviation includes the estimator's error. With one seed,
only the estimator's error is known, and a verdict applies only to the samples of these two networks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import copysign, floor, hypot, sqrt
from statistics import NormalDist, fmean, stdev

from scipy.stats import t as student_t

FALSE_POSITIVES = 0.05
"""Largest probability of a verdict if there is no difference, for each comparison."""
BOOTSTRAP_DRAWS = 2_000
"""Number of resamples of the curves within their errors, for the range of a factor."""
RANGE = (0.16, 0.84)
"""The reported quantiles of a factor, about one standard error to either side."""
ONE_SEED = "in these runs; one seed, so no verdict about training"
"""Text added to a verdict without a deviation over seeds."""


@dataclass(frozen=True)
class Measured:
    """A number with its standard error."""

    value: float
    stderr: float
    seeds: int = field(default=1, compare=False)
    """Number of seeds from whose deviation the error is computed; with 1 it is the estimator's error."""

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.stderr:.2g}"


@dataclass(frozen=True)
class CurvePoint:
    """A distance at a given cost, which is network evaluations or images seen."""

    cost: float
    distance: Measured


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison with one baseline."""

    factor: float | None
    """The cost of the baseline (in evaluations or images) divided by that of the candidate, or the difference
    of distances in standard errors; None if the candidate does not reach the baseline's quality."""
    text: str
    low: float | None = None
    """16% quantile of the factor, given the errors of the distances; 0 if the quality is not reached."""
    high: float | None = None
    """84% quantile of the factor."""
    seeds: int = 1
    """The smaller number of seeds of the two; with 1 the verdict is about samples, not about training."""

    def record(self) -> dict[str, float | int | str | None]:
        """The verdict in results.json."""
        covers = "training seeds" if self.seeds > 1 else "samples"
        return {
            "factor": self.factor,
            "words": self.text,
            "low": self.low,
            "high": self.high,
            "seeds": self.seeds,
            "covers": covers,
        }


def over_seeds(values: Sequence[Measured]) -> Measured:
    """Mean and deviation over several seeds; for one seed, the number unchanged."""
    if len(values) == 1:
        return values[0]
    return Measured(fmean(v.value for v in values), stdev(v.value for v in values), len(values))


def mean_of_seeds(values: Sequence[Measured]) -> Measured:
    """The mean over seeds with its standard error; for one seed, the number unchanged."""
    mean = over_seeds(values)
    return Measured(mean.value, mean.stderr / sqrt(len(values)), mean.seeds)


def reached_at(curve: Sequence[CurvePoint], distance: float) -> float | None:
    """The smallest cost at which the curve is at or below `distance`; None if there is none."""
    return min((point.cost for point in curve if point.distance.value <= distance), default=None)


def compare_cost(candidate: Sequence[CurvePoint], baseline: Sequence[CurvePoint], unit: str) -> Verdict:
    """Compare the costs of reaching the baseline's best distance plus its standard error.

    Costs are measured, not interpolated, so a factor is as coarse as the grid of costs. The range of the
    factor comes from resampling every distance within its standard error (always with the same seed), from
    Student's t if the error is computed from few seeds. The candidate is cheaper if this range lies above 1,
    which is rare for equal curves (about 1% in simulations), because a target is harder to reach than to set.
    It is more costly if all but 2.5% of the resampled factors lie below 1.

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
    low, high = (_quantile(factors, quantile) for quantile in RANGE)
    most = _quantile(factors, 1 - FALSE_POSITIVES / 2)
    undecided = low <= 1 <= most
    seeds = min(point.distance.seeds for point in (*candidate, *baseline))
    error_range = f"{_times_fewer(low)} to {_times_fewer(high)} within the errors"
    if cost is None:
        nearest = min(point.distance.value for point in candidate)
        text = (
            f"its best distance ({target:.3g}) is not reached: {nearest:.3g} at the least, where it needs "
            f"{baseline_cost:,.0f} {unit} ({error_range})"
        )
        if undecided:
            text = f"not distinguishable: {text}"
        return Verdict(None, _about(text, seeds), low, high, seeds)
    factor = baseline_cost / cost
    costs = (
        f"{target:.3g} is reached at {cost:,.0f} {unit}, by the other at {baseline_cost:,.0f} ({error_range})"
    )
    result = "not distinguishable" if undecided else _times_fewer(factor)
    return Verdict(factor, _about(f"{result}: {costs}", seeds), low, high, seeds)


def compare_quality(candidate: Measured, baseline: Measured) -> Verdict:
    """Test whether the distances differ significantly; the factor is the baseline's minus the candidate's.

    The factor is in standard errors. With several seeds this is Welch's test: Student's t with the degrees of
    freedom of both deviations, rounded down, which keeps `FALSE_POSITIVES` for any ratio of the deviations.
    """
    error = hypot(candidate.stderr, baseline.stderr)
    difference = baseline.value - candidate.value
    without_error = copysign(float("inf"), difference) if difference else 0.0
    deviation = difference / error if error else without_error
    result = "not distinguishable"
    threshold = critical_deviation(candidate, baseline)
    if abs(deviation) >= threshold:
        result = "better" if deviation > 0 else "worse"
    text = (
        f"{result}: {candidate} against {baseline} ({deviation:+.1f} standard errors; {threshold:.1f} are "
        "needed)"
    )
    seeds = min(candidate.seeds, baseline.seeds)
    return Verdict(deviation, _about(text, seeds), seeds=seeds)


def critical_deviation(first: Measured, second: Measured) -> float:
    """Critical difference of two numbers, in standard errors, at the level `FALSE_POSITIVES`."""
    over_seeds = [number for number in (first, second) if number.seeds > 1]
    total = sum(number.stderr**2 for number in over_seeds)
    if not total:
        return NormalDist().inv_cdf(1 - FALSE_POSITIVES / 2)
    freedom = total**2 / sum(number.stderr**4 / (number.seeds - 1) for number in over_seeds)
    return float(student_t.ppf(1 - FALSE_POSITIVES / 2, floor(freedom + 1e-9)))


def _about(text: str, seeds: int) -> str:
    return text if seeds > 1 else f"{text}; {ONE_SEED}"


def _quantile(values: Sequence[float], quantile: float) -> float:
    """The value at a quantile of a sorted sequence."""
    return values[int(quantile * len(values))]


def _target(curve: Sequence[CurvePoint]) -> float:
    """The best distance of a curve plus its standard error."""
    best = min(curve, key=lambda point: point.distance.value).distance
    return best.value + best.stderr


def _factor(candidate: Sequence[CurvePoint], baseline: Sequence[CurvePoint]) -> float:
    """Ratio of the baseline's to the candidate's cost; 0 if the candidate does not reach the target."""
    target = _target(baseline)
    baseline_cost, cost = reached_at(baseline, target), reached_at(candidate, target)
    return baseline_cost / cost if baseline_cost and cost else 0.0


def _resampled(curve: Sequence[CurvePoint], rng: random.Random) -> list[CurvePoint]:
    return [
        CurvePoint(point.cost, replace(d, value=d.value + d.stderr * _standard_error(d, rng)))
        for point in curve
        for d in [point.distance]
    ]


def _standard_error(number: Measured, rng: random.Random) -> float:
    """Draw from the standard normal distribution or, if the error is of few seeds, from Student's t."""
    if number.seeds == 1:
        return rng.gauss(0, 1)
    freedom = number.seeds - 1
    return rng.gauss(0, 1) / sqrt(rng.gammavariate(freedom / 2, 2) / freedom)


def _times_fewer(factor: float) -> str:
    if factor == 0:
        return "not reached"
    if factor == 1:
        return "as many"
    return f"{factor:.2g} times fewer" if factor > 1 else f"{1 / factor:.2g} times more"
