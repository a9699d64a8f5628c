"""Every objective trains through the real DeepSpeed engine (objectives_rank.py)."""

import math

import pytest

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.method.registry import supported_pairs
from fm_core.stages.train import check_training
from tests.support.objectives_rank import METHODS
from tests.support.rank_launch import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch("objectives_rank", tmp_path_factory.mktemp("objectives"), 1, "results-objectives.json")


@pytest.mark.parametrize("objective", METHODS)
def test_two_steps_are_taken_and_move_the_weights(results, objective):
    end = results[objective]
    assert (end["steps"], end["applied"]) == (2, 2)
    assert len(end["losses"]) == 2
    assert all(math.isfinite(loss) for loss in end["losses"])
    assert end["moved"] > 0.01
    assert math.isfinite(end["validation_loss"])


def test_training_through_the_solver_is_the_same_under_zero_2_and_close_to_it_in_bfloat16(results):
    losses = results["maximum-likelihood"]["losses"]
    assert results["maximum-likelihood zero_stage"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert results["maximum-likelihood precision"]["losses"] == pytest.approx(losses, rel=0.02)


def test_training_through_the_solver_under_zero_3_is_refused_before_anything_starts(tmp_path):
    config = RunConfig.model_validate(
        {
            "run": {"root": str(tmp_path)},
            "method": {"objective": "maximum-likelihood"},
            "train": {"zero_stage": 3},
        }
    )
    with pytest.raises(UserError, match=r"train\.zero_stage 3: maximum-likelihood"):
        check_training(config)


def test_no_objective_is_left_out():
    assert {objective for objective, _ in supported_pairs()} == set(METHODS)
