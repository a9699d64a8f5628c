"""Shards of several ranks, as rank 0 sees it: problems of the others, and a job that took over."""

import torch

from fm_core.checkpoint import optimizer_writer
from fm_core.checkpoint.ownership import WriteAccess
from fm_core.checkpoint.tensor_layout import Fragment, TensorLayout
from fm_core.checkpoint.writer import CheckpointWriter, SaveProblem
from fm_core.errors import LeaseLostError
from fm_core.run.fence import Unfenced
from fm_core.storage.store import Store

LAYOUT = TensorLayout.of({"a": (4,)}, [[Fragment("a", 0, 2, 0, 0)], [Fragment("a", 2, 2, 0, 0)]])
PARTS = ("optimizer/exp_avg",)
FULL = SaveProblem("the disk of rank 1 is full", temporary=True)


class Superseded(Unfenced):
    """The fence of a job whose successor takes over while the other rank writes."""

    lost = False

    def check(self):
        if self.lost:
            raise LeaseLostError("another job has taken over")


class FirstOfTwo(optimizer_writer.RankCopies):
    """Rank 0 of two; the answers of rank 1 are given, and called where they are functions."""

    def gathered(self, value):
        answer = next(self.group)
        return [value, answer() if callable(answer) else answer]


def ended_with(tmp_path, outcome, fence):
    place = WriteAccess(Store.at(str(tmp_path)), fence=fence)
    writer = CheckpointWriter(tmp_path, place, place)
    assert writer.begin(3) is None
    answers = iter([None, True, outcome])
    here = FirstOfTwo(answers, 0, 2, LAYOUT, {PARTS[0]: [torch.ones(2)]}, lambda at: None)
    return writer, optimizer_writer.write_shards(here, writer, 3, PARTS, {})


def test_facts_of_another_rank_are_recorded_beside_those_of_this_one(tmp_path):
    facts = {"optimizer/00001-of-00002.safetensors": {"bytes": 1, "sha256": "0" * 64}}
    writer, result = ended_with(tmp_path, (None, facts), Superseded())
    assert result is None
    assert (writer.directory(3) / "optimizer" / "00000-of-00002.safetensors").exists()
    assert [*writer._written] == [f"optimizer/0000{rank}-of-00002.safetensors" for rank in range(2)]


def test_a_problem_of_another_rank_is_that_of_the_checkpoint(tmp_path):
    _, result = ended_with(tmp_path, (FULL, {}), Superseded())
    assert result == FULL


def test_a_job_that_took_over_is_the_cause_of_the_problem_of_another_rank(tmp_path):
    fence = Superseded()

    def removed_by_the_successor():
        fence.lost = True
        return FULL, {}

    _, result = ended_with(tmp_path, removed_by_the_successor, fence)
    assert isinstance(result, LeaseLostError)
