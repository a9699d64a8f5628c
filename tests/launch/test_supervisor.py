"""Supervisor: the end of a job and its restarts."""

import socket
from contextlib import contextmanager

import pytest

from fm_core.config import RunConfig
from fm_core.errors import JobFailedError, StopRequested, UnrecoverableError, UserError
from fm_core.launch.dispatch import Job, submitted
from fm_core.launch.failure_reasons import failure_of
from fm_core.launch.restart_policy import pause
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.stages.train import newest_step
from fm_core.storage.atomic_files import read_lines


def test_ranks_that_end_well_without_finishing_are_a_failure(job):
    job.does("write;nothing")
    with pytest.raises(RuntimeError, match="not complete"):
        job.run(complete=lambda: (job.control / "made-1.json").exists())


def test_a_job_whose_rank_is_killed_starts_again_and_each_restart_is_reported(job):
    job.launch(restarts=3)
    job.does("killed-2;write")
    events = []

    @contextmanager
    def meanwhile():
        events.append(submitted(job.control).id)
        yield
        events.append("closed")

    submissions = []
    job.run(
        complete=lambda: (job.control / "made-0.json").exists(),
        meanwhile=meanwhile,
        before_submit=lambda: submissions.append(getattr(submitted(job.control), "id", None)),
    )
    assert events[1:] == ["closed"]
    assert len(set(submissions)) == 3
    assert events[0] != submitted(job.control).id
    records = read_lines(job.logs / "restarts.jsonl")
    assert [(record["restart"], record["of"], record["pause_seconds"]) for record in records] == [
        (1, 3, 0.2),
        (2, 3, 0.4),
    ]
    host = socket.gethostname()
    assert all(f"rank 0 on {host} was killed" in record["because"] for record in records)
    messages = [progress.message for progress in job.seen]
    assert any(message.startswith("restart 2 of 3 in 0.4 s: pretend failed") for message in messages)
    assert len(list(job.control.glob("here-0-*"))) == 3


def test_a_store_that_is_unavailable_is_waited_for(job):
    job.launch(restarts=2)
    job.does("unreachable-1;write")
    job.run(complete=lambda: (job.control / "made-0.json").exists())
    (record,) = read_lines(job.logs / "restarts.jsonl")
    assert "rank 0: s3://bucket: tried 5 times" in record["because"]


def test_restarts_come_to_an_end_and_one_that_gave_up_has_none(job):
    job.launch(restarts=1)
    job.does("killed-9;write")
    with pytest.raises(JobFailedError, match="rank 0 on"):
        job.run()
    assert len(list(job.control.glob("here-0-*"))) == 2
    job.does("no recovery;wait")
    with pytest.raises(UnrecoverableError, match=r"^nothing helps$"):
        job.run()
    assert len(list(job.control.glob("here-0-*"))) == 3
    assert job.processes() == []


def starts_until_given_up(tmp_path, monkeypatch, lasting):
    """Number of starts and the recorded restarts of jobs that fail, with the lasting progress after each."""
    starts = []
    launch = {"restarts": 2, "restart_seconds": 0.0}
    config = RunConfig.model_validate({"run": {"root": str(tmp_path)}, "launch": launch})

    def fail(*_):
        starts.append(True)
        raise JobFailedError("a rank was killed")

    facts = {"id": "a1", "stage": "pretend", "host": "h", "processes": 1, "threads": 1, "log": "l"}
    job = Job.model_validate(facts)
    monkeypatch.setattr("fm_core.launch.supervisor.attach_or_submit", lambda stage_job, observe, last: job)
    monkeypatch.setattr("fm_core.launch.supervisor._watch", fail)
    stage_job = StageJob(
        *(tmp_path, tmp_path, "pretend", "none", config, lambda: False),
        durable_progress=lambda: lasting[min(len(starts), len(lasting)) - 1],
    )
    with pytest.raises(JobFailedError):
        supervise(stage_job, lambda progress: None)
    return len(starts), [record["restart"] for record in read_lines(tmp_path / "restarts.jsonl")]


@pytest.mark.parametrize(
    ("lasting", "starts", "restarts"),
    [
        ([0], 3, [1, 2]),
        ([50], 3, [1, 2]),  # of an earlier life
        ([0, 0, 100, 100, 200], 7, [1, 2, 1, 2, 1, 2]),
        ([100, 90, 200, 100, 90], 5, [1, 2, 1, 2]),  # only more than ever before counts
    ],
)
def test_lasting_progress_resets_the_restart_count(tmp_path, monkeypatch, lasting, starts, restarts):
    assert starts_until_given_up(tmp_path, monkeypatch, lasting) == (starts, restarts)


def test_the_lasting_progress_of_training_is_its_newest_checkpoint(tmp_path):
    run = RunDirectory(RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "a"}}))
    assert newest_step(run) == 0
    write_status(run.path, Progress("train", 1, 9, "images"), last_checkpoint="step-00000120")
    assert newest_step(run) == 120


def test_a_stop_file_ends_the_pause_before_a_restart(tmp_path):
    (tmp_path / "STOP").touch()
    with pytest.raises(StopRequested):
        pause(100, tmp_path)
    with pytest.raises(StopRequested):
        pause(0, tmp_path / "control", tmp_path)
    pause(0, tmp_path / "control")


def test_what_ended_each_rank_reaches_the_caller(job):
    job.launch(processes=3)
    job.does("refuse;raise;killed")
    with pytest.raises(UserError, match=r"^sample.steps: this cannot be$"):
        job.run()
    handle = submitted(job.control)
    assert job.processes() == []
    # Without the refusal it would have been a failure, reported in one line.
    job.control.joinpath("pretend-0.end.json").unlink()
    verdict = str(failure_of(handle, job.control))
    assert f"rank 2 on {socket.gethostname()} was killed" in verdict
    assert "rank 1: ZeroDivisionError: a number" in verdict
    assert "\n" not in verdict
    assert handle.log in verdict
    log = (job.logs / "pretend-1.log").read_text()
    assert "rank 1 does raise" in log
    assert "Traceback" in log
