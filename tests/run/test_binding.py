"""A run is bound to its configuration by its first training step; a refused start leaves no trace."""

from pathlib import Path

import pytest

from fm_core.config import RunConfig, dump_yaml, load_config
from fm_core.config.derived_defaults import with_generator
from fm_core.errors import UserError
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.run.directory import RunDirectory
from fm_core.run.history import read_history
from fm_core.run.progress import Progress, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.run.status import read_status
from fm_core.storage.atomic_files import read_lines, write_json, write_text


def config_at(root: Path, **sections) -> RunConfig:
    return RunConfig.model_validate({"run": {"root": str(root), "name": "photos"}, **sections})


def stage(config: RunConfig, *, begins: bool, refuses: bool) -> RunDirectory:
    """A start of a stage; the directory that it had."""
    used: list[RunDirectory] = []

    def work(run, observe):
        used.append(run)
        observe(Progress("train", 0, 1, "images"))
        if begins:
            run.begin()
            observe(Progress("train", 1, 1, "images"))
        if refuses:
            raise UserError("train.global_batch: no")
        return StageResult(stage="train", state="done", seconds=0, summary="")

    if refuses:
        with pytest.raises(UserError, match=r"train\.global_batch"):
            run_stage_function("train", config, no_progress, work)
    else:
        run_stage_function("train", config, no_progress, work)
    return used[0]


def test_a_start_that_is_refused_leaves_nothing(tmp_path):
    stage(config_at(tmp_path / "runs"), begins=False, refuses=True)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_start_changes_nothing_of_a_finished_run(tmp_path):
    run = stage(config_at(tmp_path), begins=True, refuses=False)
    run.bind()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stage(config_at(tmp_path, train={"images": 256_000}), begins=False, refuses=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (read_status(run.path) or {})["phase"] == "done"


def test_only_an_accepted_start_keeps_what_an_earlier_version_knew(tmp_path):
    config = config_at(tmp_path)
    status = {"stage": "train", "phase": "done", "last_checkpoint": "step-00000300"}
    write_json(RunDirectory(config).path / "status.json", status)
    stage(config, begins=False, refuses=True)
    assert read_history(RunDirectory(config).path) is None
    stage(config, begins=True, refuses=True)
    history = read_history(RunDirectory(config).path)
    assert history
    assert history.completed_step == 300


def test_an_accepted_start_is_in_the_history_but_binds_nothing(tmp_path):
    run = stage(config_at(tmp_path), begins=True, refuses=False)
    assert [line["state"] for line in read_lines(run.history)] == ["done"]
    assert not (run.path / "config.yaml").exists()
    stage(config_at(tmp_path, model={"channels": 64}), begins=True, refuses=False)


def test_the_first_step_binds(tmp_path):
    config = config_at(tmp_path)
    run = stage(config, begins=True, refuses=False)
    run.bind()
    assert load_config(run.path / "config.yaml") == with_generator(config)
    with pytest.raises(UserError, match=r"model\.channels was 32 and is now 64; choose another run\.name"):
        stage(config_at(tmp_path, model={"channels": 64}), begins=True, refuses=False)


def test_what_is_continued_from_the_directory_does_not_start_over_again(tmp_path):
    config = config_at(tmp_path, train={"start_over": True})
    RunDirectory(config).bind()
    assert load_config(RunDirectory(config).path / "config.yaml") == with_generator(config_at(tmp_path))


def test_a_run_that_another_start_has_bound_meanwhile_is_not_bound_again(tmp_path):
    late = RunDirectory(config_at(tmp_path, model={"channels": 64}))
    late.check()
    RunDirectory(config_at(tmp_path)).bind()
    with pytest.raises(UserError, match=r"model\.channels"):
        late.bind()
    with pytest.raises(UserError, match=r"model\.channels"):
        late.check_identity()


def test_what_an_earlier_version_left_of_a_refused_start_binds_nothing(tmp_path):
    run = RunDirectory(config_at(tmp_path, model={"channels": 64}))
    write_text(run.path / "config.yaml", dump_yaml(config_at(tmp_path)))
    run.check()
    write_text(run.path / "train" / "metrics.jsonl", "{}\n")
    with pytest.raises(UserError, match=r"model\.channels"):
        run.check()


def test_a_job_before_its_first_step_is_not_joined_by_another_configuration(tmp_path, monkeypatch):
    """config.yaml does not exist yet; the running job's own configuration decides."""
    from fm_core.launch import job_ownership
    from fm_core.launch.job import Job

    run = begun = RunDirectory(config_at(tmp_path))
    begun.begin()
    write_text(run.path / "logs" / "train.yaml", dump_yaml(run.config))
    job = Job(id="x", stage="train", host="h", processes=1, threads=1, log="l")
    write_json(run.path / "job.json", job.model_dump())
    monkeypatch.setattr(job_ownership, "alive", lambda job: True)
    other = config_at(tmp_path, model={"channels": 64})
    stage_job = StageJob(run.path, run.path / "logs", "train", "a:b", other, lambda: False)
    with pytest.raises(UserError, match=r"another configuration: model\.channels was 32 and is now 64"):
        supervise(stage_job, no_progress)
