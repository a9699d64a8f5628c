"""The DeepSpeed engine, averages, checkpoints and skipped steps in real processes (engine_rank.py)."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support.trainer_lab import losses

KINDS = ["zero-1", "zero-2", "zero-3", "bf16", "bf16-accumulated", "bf16-zero-3"]


@pytest.mark.parametrize("kind", KINDS)
class TestAverages:
    def test_equal_a_naive_average_of_the_full_weights(self, two_ranks, kind):
        result = two_ranks[kind]
        assert result["steps"] == [0, 1, 2, 3, 4, 5]
        assert result["moved"] > 0.01
        assert result["average_distance"] > 0.01
        assert result["naive"] < 1e-6

    def test_reading_them_does_not_change_the_weights(self, two_ranks, kind):
        assert two_ranks[kind]["looking_changes_nothing"]

    def test_a_checkpoint_restores_weights_moments_and_averages_exactly(self, two_ranks, kind):
        assert two_ranks[kind]["state"]
        assert two_ranks[kind]["loaded_raw"]
        assert two_ranks[kind]["loaded_moments"]
        assert two_ranks[kind]["loaded_averages"]

    def test_training_goes_on_from_it_to_the_bit(self, two_ranks, kind):
        assert two_ranks[kind]["went_on"] > 1e-3
        assert two_ranks[kind]["went_on_raw"]
        assert two_ranks[kind]["went_on_averages"]
        assert two_ranks[kind]["went_on_moments"]
        assert two_ranks[kind]["went_on_ids"]
        one, other = two_ranks[kind]["went_on_losses"]
        assert one == other


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages_have_the_same_losses(folder, two_ranks, stage):
    first = losses(folder / "zero-1")
    assert len(first) == 5  # of 8 steps: at 2, 4, 6 by one trainer, at 8 by two
    assert losses(folder / f"zero-{stage}") == pytest.approx(first, rel=1e-5)


def assert_close(folder, one, other):
    a, b = (load_file(folder / name / "average.safetensors") for name in (one, other))
    for name in a:
        assert (a[name] - b[name]).abs().max() < 2e-5


def test_accumulation_changes_nothing_but_rounding(folder, two_ranks):
    assert len(two_ranks["unaccumulated"]["losses"]) == 6
    assert two_ranks["accumulated"]["losses"] == pytest.approx(two_ranks["unaccumulated"]["losses"], rel=1e-5)
    assert_close(folder, "accumulated", "unaccumulated-2")


@pytest.mark.parametrize("ranks", [1, 3, 4])
class TestOtherNumbersOfProcesses:
    def test_train_from_the_start_as_two_do_but_for_rounding(self, folder, two_ranks, other_ranks, ranks):
        assert other_ranks[ranks]["unaccumulated"]["losses"] == pytest.approx(
            two_ranks["unaccumulated"]["losses"], rel=1e-5
        )
        assert_close(folder, f"unaccumulated-{ranks}", "unaccumulated-2")

    @pytest.mark.parametrize("kind", KINDS)
    def test_continue_what_two_began_with_the_same_batches(self, folder, two_ranks, other_ranks, ranks, kind):
        assert other_ranks[ranks]["written_by"] == 2
        ours, theirs = other_ranks[ranks][f"half {kind}"], two_ranks[f"half {kind}"]
        assert ours["ids"] == theirs["ids"]
        assert [len(ids) for ids in ours["ids"]] == [12, 12]
        tolerance = 1e-5 if kind.startswith("zero") else 2e-2
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
        self.assert_same_end(folder, f"half-{kind}-{ranks}", f"half-{kind}", kind)

    def test_continue_it_with_another_zero_stage(self, folder, two_ranks, other_ranks, ranks):
        ours, theirs = other_ranks[ranks]["stage"], two_ranks["half zero-3"]
        assert ours["ids"] == theirs["ids"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        self.assert_same_end(folder, f"stage-{ranks}", "half-zero-3", "zero-3")

    def test_continue_a_checkpoint_of_an_earlier_version_to_the_bit(self, folder, other_ranks, ranks):
        ours, theirs = other_ranks[ranks]["earlier"], other_ranks[ranks]["half zero-1"]
        assert ours == theirs
        names = [folder / f"{kind}-{ranks}" / "end.safetensors" for kind in ("earlier", "half-zero-1")]
        a, b = (load_file(name) for name in names)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)

    def assert_same_end(self, folder, one, other, kind):
        a, b = (load_file(folder / name / "end.safetensors") for name in (one, other))
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name] - b[name]).abs().max() < (5e-5 if kind.startswith("zero") else 2e-2), name


def test_a_checkpoint_of_another_network_is_refused_by_all_in_one_line(two_ranks):
    for message in two_ranks["stranger"]:
        assert "model.channels was 8 and is now 16" in message
        assert "image_shape was None and is now [3, 64, 64]" in message
        assert "\n" not in message
    assert len(two_ranks["stranger"]) == 2


def test_all_ranks_take_the_checkpoint_before_a_damaged_one(two_ranks):
    assert two_ranks["damaged"]["steps"] == [4, 6, 8]
    assert two_ranks["damaged"]["taken"] == [6, 6]


def test_where_every_checkpoint_is_damaged_it_is_an_error_and_no_fresh_start(two_ranks):
    assert len(two_ranks["damaged"]["none"]) == 2
    for message in two_ranks["damaged"]["none"]:
        assert message.startswith("UserError: no checkpoint under")
        assert "state.json differs from its SHA-256" in message
        assert "\n" not in message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_any_rank_is_the_same_problem_on_all_and_loses_nothing(two_ranks, rank):
    result = two_ranks["full_disk"][rank]
    assert len(result["messages"]) == 2
    for message in result["messages"]:
        assert message.startswith("cannot write checkpoint ")
        assert "step-00000009 (" in message
        assert "File too large" in message
        assert "\n" not in message
    assert result["names"] == ["step-00000006"]
    assert result["step"] == 6


def test_a_rank_whose_host_does_not_have_the_folder_sends_its_shard(two_ranks):
    result = two_ranks["without_a_shared_folder"]
    assert result["problems"] == [None, None]
    assert result["asked"] == [0, 1]
    trained, shared, sent = result["files"]
    assert sorted(name for name in shared if name.startswith("optimizer")) == [
        "optimizer/00000-of-00002.safetensors",
        "optimizer/00001-of-00002.safetensors",
    ]
    assert [*shared] == [*sent] == [*trained]
    assert result["equal"]
    assert {name: facts["bytes"] for name, facts in shared.items()} == {
        name: facts["bytes"] for name, facts in sent.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_batch_of_one_rank_reaches_neither_weights_nor_averages(two_ranks, kind):
    result = two_ranks[f"skip {kind}"]
    assert result["applied"] == 5
    assert result["finite"]
    assert result["state"] == [6, 5, 72, 72]
    assert [line["skipped_steps"] for line in result["lines"]] == [0, 1, 1]
    # The loss of the good rank still counts.
    assert all(line["loss"] is not None and line["loss"] > 0 for line in result["lines"])


def test_after_three_in_a_row_training_goes_back_once_past_the_data(two_ranks):
    result = two_ranks["going_back"]
    state = result["state"]
    assert (state["step"], state["applied_steps"], state["skipped_in_a_row"]) == (8, 7, 0)
    assert (state["images_seen"], state["position"], state["rollbacks"]) == (96, 120, 1)
    assert result["by_hand"] == [96, 120]
    assert result["equal"]
    assert (result["record"]["step"], result["record"]["position"]) == (6, 96)
    assert "3 steps in a row" in result["record"]["because"]
    assert result["steps"] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_second_time_it_gives_up_with_the_facts_instead_of_going_on_to_the_end(two_ranks):
    result = two_ranks["no_way_on"]
    assert len(result["again"]) == 2
    for message in result["again"]:
        assert message.startswith("UnrecoverableError: the gradient was not finite in 2 steps in a row")
        assert "step 6 (stream position 96" in message
        assert "already rolled back once" in message
    assert result["steps"] == [2, 4]


def test_without_a_checkpoint_it_gives_up_at_once(two_ranks):
    for message in two_ranks["no_way_on"]["nothing_to_go_back_to"]:
        assert "not finite in 2 steps in a row" in message
        assert "no checkpoint" in message
