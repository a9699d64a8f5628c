"""The best point, the points that cannot be distinguished from it, and its fresh samples."""

from pathlib import Path

import numpy as np
import pytest

from fm_core.config import RunConfig
from fm_core.sweep.point_ranking import (
    BEST,
    OPEN,
    WORSE,
    ScoredPoint,
    best_of,
    check_record,
    ranked,
    threshold,
)
from fm_core.sweep.sweep_points import SweepPoint

CONFIG = RunConfig()


def scored(*values, stderr=1.0, metric="frechet_distance", **protocol):
    return [
        ScoredPoint(
            SweepPoint({"sample.steps": number}, f"steps {number}", CONFIG, False),
            {
                "protocol": {"seed": 0, "images": 10, "features_sha256": "f"} | protocol,
                metric: {"value": float(value), "stderr": stderr, "images": 10},
            },
            Path(f"/nowhere/{number}.json"),
        )
        for number, value in enumerate(values)
    ]


def verdicts(metric, points):
    return [point.verdict for point in ranked(metric, points, best_of(metric, points))]


def test_a_distance_is_better_if_lower_and_a_score_if_higher():
    assert verdicts("frechet_distance", scored(9, 1, 1.5)) == [WORSE, BEST, OPEN]
    assert verdicts("recall", scored(9, 1, 8.5, metric="recall")) == [BEST, WORSE, OPEN]
    assert verdicts("frechet_distance", scored(3)) == [BEST]


def test_scores_on_different_scales_have_no_best_point():
    other = scored(1, features_sha256="g")
    assert best_of("frechet_distance", [*scored(2), *other]) is None
    assert best_of("frechet_distance", []) is None


def test_the_threshold_is_that_of_a_one_sided_test_for_all_comparisons():
    assert threshold(2) == pytest.approx(1.6449, abs=1e-4)
    assert threshold(6) == pytest.approx(2.3263, abs=1e-4)
    assert threshold(1) == threshold(2)


@pytest.mark.parametrize("count", [2, 6])
def test_the_truly_best_point_is_rarely_called_worse(count):
    """Points of equal expected scores are the hardest case; 5% of the sweeps may miss any one of them."""
    random, missed, sweeps = np.random.default_rng(0), 0, 1500
    for _ in range(sweeps):
        values = random.normal(size=count)
        missed += verdicts("frechet_distance", scored(*values))[0] == WORSE
    assert missed / sweeps < 0.05 + 3 * (0.05 * 0.95 / sweeps) ** 0.5
    assert missed > 0


def test_the_best_of_equal_points_is_too_low_in_the_sweep_and_not_on_fresh_samples():
    random, seemed, fresh = np.random.default_rng(1), [], []
    for _ in range(500):
        points = scored(*random.normal(5, 1, size=8))
        chosen = points[best_of("frechet_distance", points)]
        (again,) = scored(random.normal(5, 1), seed=1)
        record = check_record("frechet_distance", chosen, again)
        seemed.append(chosen.scores["frechet_distance"]["value"])
        fresh.append(record["value"])
        assert record["change"]["value"] == pytest.approx(fresh[-1] - seemed[-1])
        assert record["change"]["stderr"] == pytest.approx(2**0.5)
    assert np.mean(seemed) < 4
    assert abs(np.mean(fresh) - 5) < 0.2


def test_samples_of_the_same_seed_are_not_fresh():
    one, other = scored(1)[0], scored(2)[0]
    with pytest.raises(ValueError, match="have the noise of the samples"):
        check_record("frechet_distance", one, other)


def test_fresh_samples_of_another_number_are_not_compared_with_the_sweep():
    (fresh,) = scored(2, seed=1, images=20)
    assert "change" not in check_record("frechet_distance", scored(1)[0], fresh)
