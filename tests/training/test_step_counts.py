"""What a training step costs beside its arithmetic, counted on 2 to 8 ranks (step_counts_rank.py)."""

import pytest

from tests.support.forked_ranks import run_experiments

PARAMETERS = 704_705
"""Of the network of the benchmarks' size "digits", in float32 here."""


@pytest.fixture(scope="module", params=[2, 4, 8])
def step_counts(request, tmp_path_factory):
    """Number of ranks, and the counts of one step on rank 0."""
    folder = tmp_path_factory.mktemp("step-counts")
    return request.param, run_experiments(
        "step_counts_rank", folder, request.param, f"step-{request.param}.json"
    )


def test_a_step_has_four_collectives_on_any_number_of_ranks(step_counts):
    """Gradients in one bucket, their norm, the agreement to stop; then the weights."""
    _, counts = step_counts
    collectives = {
        key: number
        for key, number in counts.items()
        if number and key not in ("schema", "operations") and not key.startswith("bytes of ")
    }
    assert collectives == {"allreduce": 3, "allgather_base": 1}


def test_a_step_sends_the_gradients_once_the_weights_once_and_twelve_bytes(step_counts):
    ranks, counts = step_counts
    assert counts["bytes of allreduce"] == 4 * PARAMETERS + 12
    padding = counts["bytes of allgather_base"] - 4 * PARAMETERS
    assert 0 <= padding <= 16 * ranks


def test_rank_0_does_not_do_more_in_a_step_on_more_ranks(step_counts):
    """ZeRO-1 updates a smaller part of the weights there."""
    _, counts = step_counts
    assert 0 < counts["operations"] <= 3_100
