"""Reflow in 2-D: pairs of noise and solution, students of a comparison, and what is refused."""

import math

import pytest
import torch
from safetensors.torch import load_file

from fm_core.commands import estimate, stage_function
from fm_core.errors import UserError
from fm_core.method.objectives import FlowMatching
from fm_core.method.registry import objective_named, path_named
from fm_core.reproduce.toy2d import reflow_2d, run_2d
from fm_core.reproduce.toy2d.few_evaluations import few_evaluations_section
from fm_core.reproduce.toy2d.fit import draw
from fm_core.reproduce.toy2d.reflow_2d import Pairs, solve_pairs
from fm_core.storage.atomic_files import read_json, write_json
from fm_core.storage.keyed_random import CURRENT, Domain, KeyedRandom
from tests.support.tiny_toy2d import CELLS, configured, place

reproduce = stage_function("reproduce")
RANDOM = KeyedRandom(CURRENT, 0, Domain.TOY2D)
FLOW = objective_named("flow-matching", path_named("optimal-transport"))
STUDENT = {"name": "again", "title": "Reflow", "pairs": 30, "steps": 5, "learning_rate": 1e-3}
FEW = {
    "experiments": ["fm-ot"],
    "solvers": ["euler", "ab2"],
    "nfe": [1, 3],
    "teacher": "fm-ot",
    "students": [STUDENT],
    "student_nfe": [1, 2],
}


class Contraction(torch.nn.Module):
    """The field u(t, x) = -2 x, whose solution at t = 1 is exp(-2) of the noise."""

    def forward(self, t, x, label=None):
        return -2 * x


def test_a_pair_is_noise_and_the_end_of_its_trajectory(monkeypatch):
    monkeypatch.setattr(reflow_2d, "PAIRS_PER_BATCH", 3)
    solved = []
    pairs = solve_pairs(Contraction(), FLOW, RANDOM, 8, solved.append)
    assert solved == [3, 6, 8]
    assert pairs.x0.shape == (8, 2)
    assert len(pairs.x0.unique(dim=0)) == 8
    torch.testing.assert_close(pairs.x1, pairs.x0 * math.exp(-2), rtol=1e-4, atol=1e-5)
    fewer = solve_pairs(Contraction(), FLOW, RANDOM, 2)
    assert fewer.x0.equal(pairs.x0[:2])


def test_a_position_of_the_stream_has_the_pair_of_its_number_and_its_own_time():
    pairs = Pairs(torch.arange(10.0).view(5, 2), -torch.arange(10.0).view(5, 2))
    sample = pairs.draw(FLOW, RANDOM, 3, 4)
    assert sample.x0.equal(pairs.x0[[3, 4, 0, 1]])
    assert sample.x1.equal(pairs.x1[[3, 4, 0, 1]])
    assert sample.t.equal(draw(FLOW, RANDOM, 3, 4).t)
    torch.testing.assert_close(sample.x_t, FLOW.path.sample(sample.x0, sample.x1, sample.t).x_t)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison with a student and two seeds, not to be modified."""
    root = tmp_path_factory.mktemp("finished")
    reproduce(configured(root, CELLS[:2], [0, 1], FEW))
    return root


def test_every_seed_has_a_student_that_is_scored_by_eulers_method(finished):
    results = read_json(place(finished, "results.json"))
    assert list(results["cells"]) == [
        *("ddpm", "fm-ot", "fm-ot-again"),
        *("ddpm-s1", "fm-ot-s1", "fm-ot-s1-again"),
    ]
    student = results["cells"]["fm-ot-s1-again"]
    assert student["label"] == "Reflow (5 steps after FM-OT), seed 1"
    assert [(point["solver"], point["nfe"]) for point in student["few_steps"]["points"]] == [
        ("euler", 1),
        ("euler", 2),
    ]
    # More training makes it no part of the comparison of objectives.
    assert set(results["over_seeds"]) == {"ddpm", "fm-ot"}
    (section,) = few_evaluations_section(results)
    table = section.parts[0]
    assert table.head == ["objective", "NFE 1", "NFE 2", "NFE 3", "dopri5"]
    (own, student) = table.rows
    assert (own[0], student[0]) == ("FM-OT", "Reflow")
    assert [bool(cell) for cell in own[1:]] == [True, False, True, True]
    assert [bool(cell) for cell in student[1:]] == [True, True, False, True]
    assert student[1].endswith(", euler")


def test_a_student_begins_with_the_weights_of_its_own_teacher(tmp_path):
    frozen = {**FEW, "students": [{**STUDENT, "learning_rate": 1e-12}]}
    reproduce(configured(tmp_path, CELLS[1:2], [0, 1], frozen))
    for name in ("fm-ot", "fm-ot-s1"):
        teacher, student = (place(tmp_path, each) for each in (name, f"{name}-again"))
        record = read_json(student / "training.json")
        assert record["teacher_sha256"] == read_json(teacher / "training.json")["tensors_sha256"]
        weights = load_file(teacher / "weights.safetensors")
        for key, tensor in load_file(student / "weights.safetensors").items():
            torch.testing.assert_close(tensor, weights[key], rtol=0, atol=1e-9)


def test_called_again_it_changes_nothing_and_another_teacher_trains_it_again(tmp_path, monkeypatch):
    config = configured(tmp_path, CELLS[1:2], few_steps=FEW)
    reproduce(config)
    with monkeypatch.context() as patch:
        patch.setattr(run_2d, "fit", None)
        assert reproduce(config).state == "verified"
    record = place(tmp_path, "fm-ot-again", "training.json")
    before = read_json(record)
    write_json(record, {**before, "teacher_sha256": "0" * 64})
    assert reproduce(config).state == "done"
    assert read_json(record)["teacher_sha256"] == before["teacher_sha256"]


def test_a_student_is_added_to_a_finished_comparison(tmp_path):
    reproduce(configured(tmp_path, CELLS[1:2], few_steps={**FEW, "students": []}))
    before = place(tmp_path, "fm-ot", "result.json").stat().st_mtime_ns
    reproduce(configured(tmp_path, CELLS[1:2], few_steps=FEW))
    assert place(tmp_path, "fm-ot", "result.json").stat().st_mtime_ns == before
    assert "fm-ot-again" in read_json(place(tmp_path, "results.json"))["cells"]


def test_without_its_teacher_a_student_fails_and_says_why(tmp_path):
    broken = [CELLS[0], {**CELLS[1], "name": "teacher", "objective": f"{__name__}:Broken"}]
    few = {**FEW, "experiments": ["ddpm", "teacher"], "teacher": "teacher"}
    with pytest.raises(RuntimeError, match="2 of 3 experiments failed"):
        reproduce(configured(tmp_path, broken, few_steps=few))
    results = read_json(place(tmp_path, "results.json"))
    assert list(results["cells"]) == ["ddpm"]
    assert "its teacher" in results["failed"]["teacher-again"]
    assert "has no weights" in results["failed"]["teacher-again"]


class Broken(FlowMatching):
    """An objective whose training fails."""

    def loss(self, network, sample, label=None):
        raise ArithmeticError("the loss is not finite")


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"pairs": 31}, "pairs was 30 and is now 31"),
        ({"steps": 6}, "steps was 5 and is now 6"),
        ({"learning_rate": 0.1}, "learning_rate was 0.001 and is now 0.1"),
    ],
)
def test_a_student_with_other_settings_needs_another_name(finished, student, message):
    few = {**FEW, "students": [{**STUDENT, **student}]}
    with pytest.raises(UserError, match=message):
        reproduce(configured(finished, CELLS[:2], [0, 1], few))


MAP = {"name": "map", "objective": "meanflow", "path": "optimal-transport"}
FLOW_MAP_STUDENT = {"name": "map", "objective": "meanflow", "steps": 1, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("few", "cells", "message"),
    [
        (
            {"students": [FLOW_MAP_STUDENT]},
            CELLS[1:2],
            "map is a flow map; in 2-D, add it to reproduce.cells",
        ),
        (
            {"students": [{**STUDENT, "name": "s1"}]},
            [*CELLS[1:2], {**CELLS[1], "name": "fm-ot-s1"}],
            "two experiments have the directory fm-ot-s1; rename",
        ),
        ({"teacher": "map", "experiments": ["map"]}, [MAP], "map has no reflow students: it is a flow map"),
        (
            {"teacher": "ddpm", "experiments": ["ddpm"]},
            CELLS[:1],
            "ddpm has no reflow students: reflow cannot",
        ),
        (
            {"teacher": "cnf", "experiments": ["cnf"]},
            CELLS[2:],
            "cnf has no reflow students: maximum-likelihood cannot be used with the coupling reflow",
        ),
    ],
)
def test_students_that_cannot_be_trained_are_refused(tmp_path, few, cells, message):
    with pytest.raises(UserError, match=message):
        reproduce(configured(tmp_path, cells, few_steps={**FEW, **few}))


def test_the_estimate_counts_its_steps_and_its_pairs(tmp_path):
    def hours(column, **student):
        few = {**FEW, "students": [{**STUDENT, **student}]}
        rows = estimate(configured(tmp_path, CELLS[1:2], few_steps=few), images_per_s=1e-3, nfe=10).rows
        return float(rows[1][column])

    # A third of a training pass for each evaluation; pairs are solved at 10 evaluations.
    assert hours(5, pairs=60) - hours(5) == pytest.approx(30 * 10 / 3e-3 / 3600, rel=0.05)
    assert hours(4, steps=10) - hours(4) == pytest.approx(5 * 16 / 1e-3 / 3600, rel=0.05)
