"""distill-model: its form, the configurations that it makes of its parameters, and its stages."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.client.schemas.objects import StateType
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

from flows.cancellation import effective_config, end_remaining_jobs
from flows.distill import distill_model, end_teacher_jobs, sampling_of, student_of
from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import UserError
from tests.support import ROOT
from tests.support.distillation import PLAIN, run, student_tree
from tests.support.page_commands import page_commands, starting_with


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
