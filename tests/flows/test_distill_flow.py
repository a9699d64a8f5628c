"""distill-model: its form, the configurations that it makes of its parameters, and its stages."""

import json
import logging
import shlex
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prefect import Flow
from prefect.client.schemas.objects import StateType
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

import flows.distill as module
import flows.pipeline
import flows.train
from flows.cancellation import effective_config, end_remaining_jobs
from flows.distill import distill_model, end_teacher_jobs, sampling_of, student_of
from flows.pair_checks import check_sampling
from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import UserError
from fm_core.run.results import StageResult
from tests.support import ROOT
from tests.support.page_commands import page_commands, starting_with
from tests.support.pair_sets import student as pair_student
from tests.support.random_checkpoint import checkpoint, config_at

REFLOW = {
    "method": {"coupling": "reflow"},
    "run": {"name": "student"},
    "model": {"class_conditional": True},
}
GENERATOR = RunConfig.model_validate({"run": {"name": "student", "generator": "numpy-v1"}}).run
PLAIN = {"run": {"name": "student"}, "model": {"class_conditional": True}}


@pytest.fixture
def teacher(tmp_path) -> str:
    """A run directory with a configuration, of another place and generator than its configuration says."""
    tree = {
        "run": {"name": "first", "root": "/elsewhere", "generator": "numpy-v1"},
        "sample": {"guidance": 1.5, "steps": 9, "solver": "heun2", "images": 50},
        "model": {"class_conditional": True},
        "train": {"label_dropout": 0.1},
    }
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(RunConfig.model_validate(tree)))
    (folder / "environment.json").touch()
    return str(folder)


def student_tree(tmp_path: Path, **data) -> dict:
    return REFLOW | {"data": {"pairs": {"samples": str(tmp_path / "pairs")}, **data}}


@pytest.fixture
def started(monkeypatch):
    """Instead of the stages, a list of what would be checked and run: (what, run.name, stages, without)."""
    calls = []

    def stage(name, config, watch=None, of=""):
        calls.append((f"{name} of {of}" if of else name, config.run.name))
        return StageResult(stage=name, state="done", seconds=0.0, summary=name)

    def subflow(name, config, of=""):
        calls.append((f"deployment {name} {of}".strip(), config.run.name))
        return StageResult(stage=name, state="done", seconds=0.0, summary=name)

    for place in (module, flows.pipeline):
        monkeypatch.setattr(place, "run_stage", stage)
        monkeypatch.setattr(place, "run_subflow", subflow)
        monkeypatch.setattr(place, "resolve", lambda config: config)
        monkeypatch.setattr(place, "check_slots", lambda apart: None)
    monkeypatch.setattr(
        module,
        "preflight",
        lambda config, stages, without=(): calls.append(
            ("preflight", config.run.name, tuple(stages), tuple(without))
        ),
    )
    monkeypatch.setattr(flows.pipeline, "_tag", lambda config: None)
    monkeypatch.setattr(flows.pipeline, "CancellationWatch", nullcontext)
    monkeypatch.setattr(flows.pipeline.last_updates, "wait", lambda: None)
    monkeypatch.setattr(flows.train, "can_be_scored", lambda config: True)
    monkeypatch.setattr(flows.train, "get_run_logger", lambda: logging.getLogger("test"))
    return calls


def run(**parameters):
    return distill_model.fn(**distill_model.validate_parameters(parameters))


def test_the_flow_is_deployed_and_its_jobs_end_with_it():
    loaded = import_object("flows.distill.distill_model")
    assert isinstance(loaded, Flow)
    assert loaded.name == "distill-model"
    assert loaded.on_cancellation_hooks == [end_remaining_jobs, end_teacher_jobs]
    deployments = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]
    assert "flows.distill.distill_model" in [deployment["entrypoint"] for deployment in deployments]


def test_the_form_describes_every_parameter_and_asks_for_the_teacher():
    schema = parameter_schema(distill_model.fn)
    assert list(schema.properties) == ["teacher", "config_file", "config", "pairs", "apart"]
    assert schema.required == ["teacher"]
    for name, field in schema.properties.items():
        assert field["description"], name


def test_the_command_of_the_page_has_valid_parameters():
    (command,) = starting_with("prefect ", page_commands(ROOT / "infra" / "docs" / "training.md"))
    words = shlex.split(command)
    assert words[:4] == ["prefect", "deployment", "run", "distill-model"]
    parameters = dict(word.split("=", 1) for word in words[5::2])
    assert set(words[4::2]) == {"--param"}
    parameters["pairs"] = json.loads(parameters["pairs"])
    distill_model.validate_parameters(parameters)
    assert (ROOT / parameters["config_file"]).exists()


def test_a_student_with_pairs_is_trained_after_its_teacher_is_sampled(teacher, tmp_path, started):
    state = run(teacher=teacher, config=student_tree(tmp_path))
    assert state.type == StateType.COMPLETED
    stages = ("shard", "train", "sample", "evaluate", "report")
    assert started == [
        ("preflight", "student", stages, ("pairs",)),
        ("preflight", "teacher", ("sample",), ()),
        ("sample of teacher", "teacher"),
        ("preflight", "student", stages, ()),
        *((stage, "student") for stage in stages),
    ]


def test_a_student_without_pairs_leaves_out_the_samples_of_its_teacher(teacher, started):
    run(teacher=teacher, config=PLAIN)
    assert [call[0] for call in started] == ["preflight", "shard", "train", "sample", "evaluate", "report"]


def test_stages_apart_are_flow_runs_of_their_own_for_both_models(teacher, tmp_path, started):
    run(teacher=teacher, config=student_tree(tmp_path), apart=["sample"])
    names = [call[0] for call in started if call[0] != "preflight"]
    assert names == ["deployment sample teacher", "shard", "train", "deployment sample", "evaluate", "report"]
    assert started[1] == ("preflight", "teacher", (), ())


def test_the_student_starts_from_its_teacher_unless_its_file_says_else(teacher, tmp_path):
    made = student_of({"teacher": teacher, "config": student_tree(tmp_path)})
    assert (made.train.init_from, made.run.generator) == (teacher, "numpy-v1")
    made = student_of({"teacher": teacher, "config": PLAIN | {"train": {"init_from": None}}})
    assert (made.train.init_from, made.run.generator) == (None, None)


def test_the_teacher_is_sampled_as_it_records_with_stored_floats_and_another_seed(teacher, tmp_path):
    student = student_of({"teacher": teacher, "config": student_tree(tmp_path)})
    sampled = sampling_of(teacher, student, {"images": 70})
    assert Path(sampled.run.root) / sampled.run.name == Path(teacher)
    sample = sampled.sample
    assert (sample.root, sample.store, sample.seed) == (str(tmp_path / "pairs"), "float32", 1)
    assert (sample.images, sample.solver, sample.steps, sample.guidance) == (70, "heun2", 9, 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "/nowhere"}, "teacher /nowhere: has no config.yaml"),
        ({"config": None}, "config_file: name a configuration file"),
        ({"config": {"trian": {}}}, "config: trian: unknown key"),
        ({"pairs": {"seed": 0}}, "seed 0 is the student's sample.seed"),
        ({"pairs": {"imags": 3}}, "sample.imags: unknown key"),
        ({"pairs": {"root": "/x"}}, "pairs: root is data.pairs.samples"),
        ({"config": PLAIN, "pairs": {"images": 3}}, "has no data.pairs.samples"),
    ],
)
def test_wrong_parameters_fail_with_one_line(teacher, tmp_path, started, changes, message):
    state = run(**{"teacher": teacher, "config": student_tree(tmp_path), **changes})
    assert state.type == StateType.FAILED
    assert message in (state.message or "")
    assert "\n" not in (state.message or "")
    assert started == []


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


def test_the_student_cannot_be_its_teacher(teacher):
    place = {"root": str(Path(teacher).parent), "name": "teacher"}
    with pytest.raises(UserError, match="is the teacher"):
        student_of({"teacher": teacher, "config": {"run": place}})


def test_a_cancelled_run_ends_only_the_samples_of_its_pairs(teacher, tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr("fm_core.launch.run_jobs.end_job", lambda control: ended.append(control.name))
    places = {"pairs-key": f"{tmp_path}/pairs/", "other-key": f"{tmp_path}/other", "own-key": None}
    for key, root in places.items():
        control = Path(teacher) / "samples" / "step-00000009" / key
        control.mkdir(parents=True)
        # The store is empty: the job has only begun.
        job = RunConfig.model_validate({"sample": {"root": root}})
        (control / "sample.yaml").write_text(dump_yaml(job))
    (Path(teacher) / "samples" / "step-00000009" / "not-begun").mkdir()
    parameters = {"teacher": teacher, "config": student_tree(tmp_path)}

    class CancelledRun:
        pass

    cancelled = CancelledRun()
    cancelled.parameters = parameters
    end_teacher_jobs(distill_model, cancelled, None)
    assert ended == ["pairs-key"]
    assert effective_config(distill_model, parameters).run.name == "student"
