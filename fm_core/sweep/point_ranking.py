"""The best point of a sweep, and the points that cannot be distinguished from it.

The best of K points is chosen on samples with the same noise. For each other point, the difference from the
best one is compared with its standard error, at a level of 5% divided by K - 1 (Bonferroni). If all errors
are right, the set of the best point and of those that are not worse contains the point whose expected score
is the best with a probability of at least 95%.

The value of the chosen point is biased: among equal points, the one whose errors happen to be favorable is
chosen (the winner's curse). Only its value on fresh samples, which had no part in the choice, is unbiased.
Its change from the value in the sweep also contains the error that all points have in common, because they
share their noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from statistics import NormalDist
from typing import Any

from fm_core.evaluation.paired_error import ScoreDifference, on_one_scale, score_difference, share_noise
from fm_core.sweep.sweep_points import SweepPoint

LEVEL = 0.05
"""Probability that the best point is missing from the set of points that are not worse."""
LOWER_IS_BETTER = ("frechet_distance", "kernel_distance")
BEST, OPEN, WORSE = "best", "not distinguishable", "worse"
"""Verdicts on points."""
Scores = Mapping[str, Any]


@dataclass(frozen=True)
class ScoredPoint:
    """A point with its scores."""

    point: SweepPoint
    scores: Scores
    """Content of the scores file."""
    file: Path
    """The scores file."""


@dataclass(frozen=True)
class RankedPoint:
    """The comparison of a point with the best one."""

    difference: ScoreDifference | None
    """Score of this point minus that of the best one; None for the best one itself."""
    verdict: str


def threshold(points: int) -> float:
    """Number of standard errors above which one of several points is worse than the best of them."""
    return NormalDist().inv_cdf(1 - LEVEL / max(1, points - 1))


def best_of(metric: str, scored: Sequence[ScoredPoint]) -> int | None:
    """Index of the best point; None if there is none, or their scores are not on one scale."""
    if not scored or not all(
        on_one_scale(s.scores["protocol"], scored[0].scores["protocol"]) for s in scored
    ):
        return None
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return min(range(len(scored)), key=lambda number: sign * scored[number].scores[metric]["value"])


def ranked(metric: str, scored: Sequence[ScoredPoint], best: int) -> list[RankedPoint]:
    """Compare each point with the best one."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    limit = threshold(len(scored))
    points: list[RankedPoint] = []
    for number, each in enumerate(scored):
        if number == best:
            points.append(RankedPoint(None, BEST))
            continue
        chosen = scored[best]
        difference = score_difference(metric, each.scores, chosen.scores, (each.file, chosen.file))
        worse = sign * difference.value > limit * difference.stderr
        points.append(RankedPoint(difference, WORSE if worse else OPEN))
    return points


def check_record(metric: str, chosen: ScoredPoint, fresh: ScoredPoint) -> dict[str, Any]:
    """Record of the best point on fresh samples, and of how much better it seemed in the sweep.

    Raises ValueError if the fresh samples have the noise of the sweep's.
    """
    protocols = [each.scores["protocol"] for each in (chosen, fresh)]
    if share_noise(*protocols) or protocols[0].get("seed") == protocols[1].get("seed"):
        raise ValueError("the fresh samples have the noise of the samples by which the point was chosen")
    record = {
        **fresh.scores[metric],
        "seed": protocols[1].get("seed"),
        "scores_file": str(fresh.file),
    }
    if on_one_scale(*protocols):
        before, after = (each.scores[metric] for each in (chosen, fresh))
        # The two sets of samples have no noise in common.
        record["change"] = {
            "value": after["value"] - before["value"],
            "stderr": hypot(after.get("stderr", 0.0), before.get("stderr", 0.0)),
        }
    return record
