"""The performance options change the losses of 20 steps only by rounding (speed_rank.py, two processes)."""

import pytest

from fm_core.config import TrainSection
from fm_core.errors import UserError
from fm_core.models.mlp import MLP
from fm_core.training.engine import _require_buckets, bucket_elements
from tests.support.forked_ranks import run_experiments

SWITCHED = {
    **dict.fromkeys(["fused", "buckets", "overlap", "overlap-2", "checkpointing"], "zero-1"),
    "all": "one block",
}
"""Each experiment, and the one without a switch."""


@pytest.fixture(scope="module")
def speed_results(tmp_path_factory):
    return run_experiments("speed_rank", tmp_path_factory.mktemp("speed"), 2, "results.json")


@pytest.mark.parametrize(("name", "without"), SWITCHED.items())
def test_a_switch_changes_losses_and_weights_only_by_rounding(speed_results, name, without):
    plain = speed_results[without]
    assert len(plain["losses"]) == 20
    assert plain["losses"][-1] < 0.9 * plain["losses"][0]
    assert speed_results[name]["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert speed_results[name]["norm"] == pytest.approx(plain["norm"], rel=1e-5)


@pytest.mark.parametrize(("name", "float32"), [("bf16", "zero-1"), ("one block, bf16", "one block")])
def test_bfloat16_has_the_losses_of_float32_within_its_own_rounding(speed_results, name, float32):
    assert speed_results[name]["losses"] == pytest.approx(speed_results[float32]["losses"], rel=0.02)


@pytest.mark.parametrize(("name", "without"), [("bf16-overlap", "bf16"), ("bf16-all", "one block, bf16")])
def test_a_switch_changes_losses_of_bfloat16_only_by_its_rounding(speed_results, name, without):
    assert speed_results[name]["losses"] == pytest.approx(speed_results[without]["losses"], rel=0.01)
    assert speed_results[name]["norm"] == pytest.approx(speed_results[without]["norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["all", "bf16-all"])
def test_the_engine_leaves_the_network_one_graph(speed_results, name):
    assert speed_results["one block"]["graphs"] == 0
    assert (speed_results[name]["graphs"], speed_results[name]["breaks"]) == (1, [])


def test_a_rank_that_compiles_nothing_and_solves_no_ode_starts_without_the_compiler_and_scipy(speed_results):
    assert speed_results["imported"] == []


@pytest.mark.parametrize("key", ["overlap", "bucket_elements"])
def test_what_the_optimizer_of_float32_sums_would_ignore_is_refused(key):
    for stage in (1, 2):
        train = TrainSection.model_validate({"zero_stage": stage, "speed": {key: 1}})
        if stage == 2:
            _require_buckets(train)
            continue
        with pytest.raises(UserError, match=rf"train\.speed\.{key} has no effect where ZeRO 1"):
            _require_buckets(train)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_convolutions_stay_channels_last_under_zero(speed_results, stage):
    result = speed_results[f"zero-{stage}"]
    assert result["layout"] == [True]
    assert result["losses"] == pytest.approx(speed_results["zero-1"]["losses"], rel=1e-5)


def test_buckets_are_an_eighth_of_the_network_within_limits():
    def bucket(width, **speed):
        return bucket_elements(MLP(width=width), TrainSection.model_validate({"speed": speed}))

    assert bucket(16) == 2**20
    assert bucket(2048) == sum(p.numel() for p in MLP(width=2048).parameters()) // 8
    assert bucket(16, bucket_elements=7) == 7
