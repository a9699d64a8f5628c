"""distill-model: what is refused before the teacher is sampled, and the samples that the student gets."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.client.schemas.objects import StateType

import flows.distill as module
import flows.pipeline
from flows.distill import sampling_of, student_of
from flows.pair_checks import check_sampling
from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import UserError
from fm_core.run.results import StageResult
from tests.support.distillation import GENERATOR, PLAIN, run, student_tree
from tests.support.pair_sets import student as pair_student
from tests.support.random_checkpoint import checkpoint, config_at

OTHER = {"method": {"coupling": "reflow", "path": "cosine"}}
UNFIT = "init_from: .* was trained with method.path optimal-transport, not cosine"


def test_a_student_of_pairs_with_another_path_starts_from_random_weights(teacher, tmp_path, caplog):
    tree = student_tree(tmp_path) | OTHER
    made = student_of({"teacher": teacher, "config": tree})
    assert made.train.init_from is None
    assert "method.path optimal-transport, not cosine; the student starts from random" in caplog.text
    with pytest.raises(UserError, match=UNFIT):
        student_of({"teacher": teacher, "config": tree | {"train": {"init_from": teacher}}})


def test_a_student_without_pairs_needs_the_network_of_its_teacher(teacher):
    with pytest.raises(UserError, match=r"model\.class_conditional True, not False"):
        student_of({"teacher": teacher, "config": {"run": {"name": "student"}}})


def test_the_home_directory_of_a_teacher_is_expanded(teacher, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(teacher).parent))
    assert student_of({"teacher": "~/teacher", "config": PLAIN}).train.init_from == teacher


@pytest.mark.parametrize(
    ("student", "pairs", "message"),
    [
        ({}, {"solver": "sde"}, "pairs: the solver sde adds noise"),
        ({}, {"solver": "edm", "stochastic": {"churn": 2}}, "pairs: the solver edm adds noise"),
        ({}, {"solver": "edm"}, None),
        ({"run": {"name": "student", "generator": "philox-v1"}}, {}, "run.generator philox-v1: the noise of"),
        ({}, {"images": 2, "seed": 4}, None),
        ({}, {"images": 1}, "of 1 pairs none would be left"),
        ({"held_out": 50}, {}, "of 50 pairs none would be left"),
        ({"held_out": 49}, {}, None),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_teacher_is_sampled(
    teacher, tmp_path, started, student, pairs, message
):
    tree = student_tree(tmp_path) | student
    if images := tree.pop("held_out", None):
        tree["data"]["pairs"]["validation_images"] = images
    state = run(teacher=teacher, config=tree, pairs=pairs)
    if message is None:
        assert state.type == StateType.COMPLETED
        return
    assert (state.type, started) == (StateType.FAILED, [])
    assert message in state.message
    assert "\n" not in state.message


def test_a_student_with_classes_needs_a_teacher_with_classes(teacher, tmp_path):
    student = RunConfig.model_validate(student_tree(tmp_path))
    sampled = sampling_of(teacher, student.model_copy(update={"run": GENERATOR}), None)
    plain = sampled.model_copy(
        update={"model": sampled.model.model_copy(update={"class_conditional": False})}
    )
    with pytest.raises(UserError, match=r"^model\.class_conditional: the teacher's samples have no classes"):
        check_sampling(plain, student.model_copy(update={"run": GENERATOR}))


def test_the_student_has_the_data_set_of_its_teacher(teacher, tmp_path, monkeypatch):
    def manifest(root, name):
        if name == "absent":
            raise UserError("no data set")
        return SimpleNamespace(version=name)

    monkeypatch.setattr("fm_core.data.manifest.load_manifest", manifest)
    for name in ("digits", "absent"):
        student = student_of({"teacher": teacher, "config": student_tree(tmp_path, name=name)})
        sampling_of(teacher, student, None)
    student = student_of({"teacher": teacher, "config": student_tree(tmp_path, name="faces")})
    with pytest.raises(UserError, match=r"^data\.name: the teacher was trained on datasets/digits, not on"):
        sampling_of(teacher, student, None)


def test_the_noise_of_the_pairs_is_new_to_a_teacher_that_was_trained_on_pairs(tmp_path):
    own = config_at(tmp_path)
    checkpoint(own, pairs={"protocol": {"seed": 7}})
    recorded = pair_student(own, "/pairs", run={"name": "r"})
    (tmp_path / "r" / "config.yaml").write_text(dump_yaml(recorded))
    (tmp_path / "r" / "environment.json").touch()
    tree = student_tree(tmp_path) | {"sample": {"seed": 3}}
    student = student_of({"teacher": str(tmp_path / "r"), "config": tree})
    assert sampling_of(str(tmp_path / "r"), student, None).sample.seed == 8
    with pytest.raises(UserError, match="pairs: seed 7 is that of the pairs that the teacher was trained on"):
        sampling_of(str(tmp_path / "r"), student, {"seed": 7})


def test_the_student_is_trained_on_the_set_that_was_sampled_even_beside_others(
    teacher, tmp_path, started, monkeypatch
):
    def stage(name, config, watch=None, of=""):
        started.append((name, config.run.name, config.data.pairs.samples))
        paths = {"samples": "/pairs/step/key"} if of == "teacher" else {}
        return StageResult(stage=name, state="done", seconds=0.0, summary=name, paths=paths)

    for place in (module, flows.pipeline):
        monkeypatch.setattr(place, "run_stage", stage)
    run(teacher=teacher, config=student_tree(tmp_path))
    assert ("train", "student", "/pairs/step/key") in started
