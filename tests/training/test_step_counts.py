"""What a training step costs beside its arithmetic, counted on 4 and 32 ranks (step_counts_rank.py)."""

import pytest

from tests.support.forked_ranks import run_experiments
from tests.support.step_counts_rank import NETWORKS


@pytest.fixture(scope="module", params=NETWORKS)
def step_counts(request, tmp_path_factory):
    """The counts of one step on every rank."""
    folder = tmp_path_factory.mktemp("step-counts")
    return run_experiments("step_counts_rank", folder, request.param, f"step-{request.param}.json")["ranks"]


def test_a_step_has_four_collectives_on_any_number_of_ranks(step_counts):
    """Gradients in one bucket, their norm, what the ranks agree on; then the weights."""
    for counts in step_counts:
        numbers = ("operations", "numbers read")
        collectives = {
            key: number
            for key, number in counts.items()
            if number and key not in numbers and not key.startswith("bytes of ")
        }
        assert collectives == {"allreduce": 3, "allgather_base": 1}


def test_a_step_sends_the_gradients_once_the_weights_once_and_six_bytes(step_counts):
    _, parameters = NETWORKS[len(step_counts)]
    for counts in step_counts:
        assert counts["bytes of allreduce"] == 4 * parameters + 6
        padding = counts["bytes of allgather_base"] - 4 * parameters
        assert 0 <= padding <= 16 * len(step_counts)


def test_a_step_waits_for_the_device_only_where_deepspeed_reads_the_norm(step_counts):
    """Twice; three more are positions, read only on a CPU, and less than one belongs to a metrics line."""
    for counts in step_counts:
        assert 5 <= counts["numbers read"] < 6


def test_no_rank_does_more_in_a_step_than_another_or_than_on_fewer_ranks(step_counts):
    """ZeRO-1 updates a smaller part of the weights on more ranks."""
    most = {4: 3_100, 32: 1_250}[len(step_counts)]
    for counts in step_counts:
        assert 0 < counts["operations"] <= most
        assert counts["operations"] == pytest.approx(step_counts[0]["operations"], rel=0.1)
