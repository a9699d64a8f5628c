"""The speed switches leave 20 steps' losses alone, but for rounding (speed_rank.py, two processes)."""

import pytest
from launched import launch

from fm_core.config import TrainSection
from fm_core.models.mlp import MLP
from fm_core.training.engine import bucket_elements

SWITCHED = ["fused", "buckets", "overlap", "overlap-2", "all", "checkpointing"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launch("speed_rank", tmp_path_factory.mktemp("speed"), 2, "found.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHED)
def test_a_switch_changes_losses_and_weights_by_rounding_alone(found, name):
    plain = found["zero-1"]
    assert len(plain["losses"]) == 20
    assert plain["losses"][-1] < 0.9 * plain["losses"][0]
    assert found[name]["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert found[name]["norm"] == pytest.approx(plain["norm"], rel=1e-5)


@pytest.mark.slow
def test_bfloat16_has_the_losses_of_float32_within_its_own_rounding(found):
    assert found["bf16"]["losses"] == pytest.approx(found["zero-1"]["losses"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_convolutions_stay_channels_last_under_zero(found, stage):
    assert found[f"zero-{stage}"]["layout"] == [True]
    assert found[f"zero-{stage}"]["losses"] == pytest.approx(found["zero-1"]["losses"], rel=1e-5)


def test_buckets_are_an_eighth_of_the_network_within_limits():
    def bucket(width, **speed):
        return bucket_elements(MLP(width=width), TrainSection.model_validate({"speed": speed}))

    assert bucket(16) == 2**20
    assert bucket(2048) == sum(p.numel() for p in MLP(width=2048).parameters()) // 8
    assert bucket(16, bucket_elements=7) == 7
