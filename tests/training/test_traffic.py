"""Network traffic predicted by fm doctor --cost against that of two processes (traffic_rank.py)."""

import pytest

from fm_core.training.cost_model import FLOAT32, network_bytes
from tests.support.rank_launch import launch


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    return launch("traffic_rank", tmp_path_factory.mktemp("traffic"), 2, "traffic.json")


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_predicted_traffic_is_what_the_collectives_carry(sent, stage, micro_batches):
    measured = sent[f"{stage}-{micro_batches}"]
    predicted = network_bytes(measured["parameters"], stage, 2, micro_batches)
    assert measured["bytes"] == pytest.approx(predicted, rel=0.02)


@pytest.mark.slow
def test_numbers_of_float32_training_are_twice_as_long(sent):
    predicted = network_bytes(sent["fp32"]["parameters"], 1, 2, 1, FLOAT32)
    assert sent["fp32"]["bytes"] == pytest.approx(predicted, rel=0.02)
