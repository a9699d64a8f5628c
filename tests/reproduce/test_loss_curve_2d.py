"""The loss curve of a 2-D experiment: means over equal intervals, at most 100 points."""

import pytest

from fm_core.reproduce.toy2d.fit import CURVE_POINTS, _averaged


@pytest.mark.parametrize("steps", [1, CURVE_POINTS - 1, CURVE_POINTS])
def test_a_short_training_is_shown_step_by_step(steps):
    assert _averaged([float(step) for step in range(steps)]) == [*range(steps)]


@pytest.mark.parametrize("factor", [2, 3, 10])
def test_a_long_one_as_means_of_all_its_steps(factor):
    curve = _averaged([float(step) for step in range(factor * CURVE_POINTS)])
    assert curve == [factor * point + (factor - 1) / 2 for point in range(CURVE_POINTS)]


def test_intervals_of_unequal_length_contain_the_first_and_the_last_step():
    steps = CURVE_POINTS * 3 // 2
    curve = _averaged([1.0, *[0.0] * (steps - 2), 1.0])
    assert len(curve) == CURVE_POINTS
    assert curve[0] > 0
    assert curve[-1] > 0
