"""Every objective trains through the real DeepSpeed engine (objectives_rank.py)."""

import math

import pytest
from launched import launch
from objectives_rank import METHODS

from fm_core.method.named import supported_pairs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launch("objectives_rank", tmp_path_factory.mktemp("objectives"), 1, "found-objectives.json")


@pytest.mark.parametrize("objective", METHODS)
def test_two_steps_are_taken_and_move_the_weights(found, objective):
    end = found[objective]
    assert (end["steps"], end["applied"]) == (2, 2)
    assert len(end["losses"]) == 2
    assert all(math.isfinite(loss) for loss in end["losses"])
    assert end["moved"] > 0.01
    assert math.isfinite(end["held_out"])


def test_no_objective_is_left_out():
    assert {objective for objective, _ in supported_pairs()} == set(METHODS)
