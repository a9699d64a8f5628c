"""Comparison at few evaluations: what is refused, students, and a small comparison."""

from dataclasses import replace
from pathlib import Path

import pytest

from fm_core.commands import stage_function, stage_functions
from fm_core.config import parse_config
from fm_core.errors import StopRequested, UserError
from fm_core.reproduce.comparison_checks import check_comparison
from fm_core.reproduce.experiments import experiments_of
from fm_core.reproduce.few_steps import few_step_scores
from fm_core.reproduce.students import bind_to_teacher, pairs_config, student_config
from fm_core.run.progress import Progress
from fm_core.run.results import StageResult
from fm_core.stages.stage_rules import rules
from fm_core.storage.atomic_files import read_json, write_json
from tests.support.tiny_image_comparison import FEW_STEPS, configured

reproduce = stage_function("reproduce")
MAP, REFLOW = FEW_STEPS["students"]
POINT = {"solver": "euler", "steps": 1, "nfe": 1.0, "frechet_distance": 3.0, "frechet_distance_stderr": 0.5}


def test_students_start_from_their_teacher_on_noise_that_they_are_not_scored_on(tmp_path):
    config = configured(tmp_path, few_steps=FEW_STEPS)
    teacher = config.model_copy(update={"sample": config.sample.model_copy(update={"seed": 7})})
    flow_map, reflow = (student_config(teacher, each) for each in config.reproduce.few_steps.students)
    runs = tmp_path / "runs"
    assert flow_map.train.init_from == reflow.train.init_from == str(runs / "both")
    assert (flow_map.sample.solver, reflow.sample.solver) == ("flow_map", "euler")
    assert (flow_map.method.coupling, reflow.method.coupling) == ("independent", "reflow")
    assert (flow_map.data.pairs.samples, reflow.data.pairs.samples) == (
        None,
        str(runs / "both-reflow" / "pairs"),
    )
    assert (flow_map.train.images, reflow.train.images) == (32, 48)
    pairs = pairs_config(teacher, config.reproduce.few_steps.students[1])
    assert (pairs.sample.images, pairs.sample.store, pairs.run.name) == (40, "float32", "both")
    assert pairs.sample.seed not in (7, flow_map.sample.seed, reflow.sample.seed)


def test_a_student_does_not_inherit_how_its_teacher_is_sampled(tmp_path):
    config = configured(tmp_path, few_steps=FEW_STEPS)
    sample = {
        **config.sample.model_dump(mode="json"),
        **{"solver": "dopri5", "steps": None, "error_norm": "worst", "weights": "ema-0.5", "step": 8},
        **{"guidance": 1.5, "guidance_interval": [0.2, 0.9], "guide": {"step": 4}},
    }
    teacher = parse_config({**config.model_dump(mode="json"), "sample": sample}, where="x")
    for student in config.reproduce.few_steps.students:
        own = student_config(teacher, student).sample
        assert (own.guidance, own.guide.named, own.weights, own.step) == (1.0, False, "ema", "latest")
        assert (own.images, own.batch, own.error_norm) == (20, 8, None)
    pairs = pairs_config(teacher, config.reproduce.few_steps.students[1]).sample
    assert (pairs.guidance, pairs.guidance_interval, pairs.guide.step) == (1.5, (0.2, 0.9), 4)
    assert (pairs.weights, pairs.step, pairs.solver, pairs.error_norm) == ("ema-0.5", 8, "midpoint", None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experiments": ["fm-ot", "none"]}, r"few_steps\.experiments: none is none of ddpm, fm-ot"),
        ({"experiments": ["ddpm"]}, "need a teacher that is one of its experiments"),
        ({"nfe": [0]}, "must be at least 1"),
        ({"nfe": []}, "at least 1"),
        ({"students": [FEW_STEPS["students"][0]] * 2}, "a name appears twice in map, map"),
        ({"students": [{"name": "x", "steps": 1, "learning_rate": 0.1}]}, "an objective of flow maps or"),
    ],
)
def test_settings_that_do_not_agree_are_refused(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        configured(tmp_path, few_steps={**FEW_STEPS, **keys})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"solvers": ["eulr"]}, "few_steps.solvers, for ddpm: eulr has no fixed number"),
        ({"solvers": ["rk4"], "nfe": [1, 2]}, "few_steps.solvers: none of rk4 takes a step in 2 evaluations"),
        ({"students": [{**MAP, "objective": "mean-flow"}]}, "students.map: unknown objective 'mean-flow'"),
        (
            {"students": [{**MAP, "objective": "data-prediction"}]},
            "students.map: objective data-prediction is",
        ),
        ({"students": [{**MAP, "objective_options": {"equal_time": 1}}]}, "students.map: unknown option"),
        (
            {"teacher": "ddpm", "students": [MAP]},
            "students.map: a flow map starts from a network that predicts",
        ),
        (
            {"students": [{**REFLOW, "pairs": 20}]},
            "students.reflow: 20 pairs are fewer than two batches of 16",
        ),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_is_trained(tmp_path, keys, message):
    config = configured(tmp_path, few_steps={**FEW_STEPS, **keys})
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as caught:
        check_comparison(config, rules)
    assert "\n" not in str(caught.value)


def test_a_student_of_other_weights_or_settings_is_not_taken_for_the_same(tmp_path):
    config = configured(tmp_path, few_steps=FEW_STEPS)
    student = config.reproduce.few_steps.students[1]
    bind_to_teacher(config, student, "a")
    bind_to_teacher(config, student, "a")
    more = student.model_copy(update={"pairs": 48})
    for other, weights, message in (
        (more, "a", r"other settings \(pairs\)"),
        (student, "b", r"other settings \(the weights of its teacher\)"),
    ):
        with pytest.raises(UserError, match=message):
            bind_to_teacher(config, other, weights)


def test_a_student_that_fails_leaves_its_teacher_and_the_other_students(tmp_path):
    """The record has the points of the solvers and the name of what failed."""
    config = configured(tmp_path, few_steps=FEW_STEPS)
    experiment = next(each for each in experiments_of(config) if each.section.name == "fm-ot")
    scores = {
        "protocol": {"weights_sha256": "w"},
        "nfe": {"mean": 20.0, "solver": "dopri5"},
        "frechet_distance": {"value": 2.0, "stderr": 0.1},
    }
    seen, file = [], tmp_path / "scores.json"
    write_json(file, {"nfe_curve": {"points": [POINT]}})

    def evaluate(config, observe):
        observe(Progress("evaluate", 1, 2, "parts"))
        return StageResult(
            stage="evaluate", state="done", seconds=0.0, summary="", paths={"scores": str(file)}
        )

    def fail(config, observe):
        raise RuntimeError("a disk is full\nand more")

    stages = replace(stage_functions(), evaluate=evaluate, train=fail, sample=fail)
    record = few_step_scores(experiment, config.reproduce.few_steps, scores, seen.append, stages)
    assert record["points"] == [POINT]
    assert record["failed"] == {
        "fm-ot-s0-map": "RuntimeError: a disk is full",
        "fm-ot-s0-reflow": "RuntimeError: a disk is full",
    }
    assert record["students"] == {}
    assert seen[0].fraction == pytest.approx(0.5 / 3, abs=0.01)

    def stop(config, observe):
        raise StopRequested("asked")

    with pytest.raises(StopRequested):
        few_step_scores(
            experiment, config.reproduce.few_steps, scores, seen.append, replace(stages, train=stop)
        )


def test_every_objective_and_student_is_scored_at_few_evaluations(few_compared):
    results = read_json(Path(few_compared[1].paths["results"]))["few_steps"]
    assert set(results["solvers"]) == {"ddpm", "fm-ot"}
    for curve in results["solvers"].values():
        points = curve["points"]
        assert [each["nfe"] for each in points] == [1, 2, 4]
        assert all(each["value"] > 0 and each["error"] > 0 for each in points)
        # The metrics of this comparison leave the kernel distance out.
        assert all(0 <= each["recognized"] <= 1 and "kernel_distance" not in each for each in points)
    assert {name: student["title"] for name, student in results["students"].items()} == {
        "map": "Map",
        "reflow": "reflow",
    }
    for student in results["students"].values():
        assert [each["nfe"] for each in student["points"]] == [1, 2]
        assert all(each["value"] > 0 for each in student["points"])
    assert results["exact"]["fm-ot"]["nfe"] > 4
    page = Path(few_compared[1].paths["report"]).read_text()
    for title in (
        "Few evaluations without training",
        "Few evaluations after training",
        "What few evaluations",
    ):
        assert title in page


def test_students_are_plain_runs_that_are_made_once(few_compared):
    root, _ = few_compared
    runs = root / "runs" / "both" / "reproduce"
    stamps = {}
    for name, images in (("fm-ot-s0-map", 32), ("fm-ot-s0-reflow", 48)):
        done = runs / name / "train" / "DONE.json"
        assert read_json(done)["images_seen"] == images
        stamps[done] = done.stat().st_mtime_ns
    again = reproduce(configured(root, few_steps=FEW_STEPS))
    assert again.state == "verified"
    assert {done: done.stat().st_mtime_ns for done in stamps} == stamps
