"""Errors of polls, status and progress, injected into a supervisor, never end the job that it watches."""

import errno
import logging
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from fm_core.config import RunConfig
from fm_core.errors import DetachedError, JobFailedError, LeaseLostError, StopRequested
from fm_core.launch import restart_policy, supervisor
from fm_core.launch.job import Job
from fm_core.launch.launcher import JobStatus
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import read_lines, write_json

JOB = {"id": "a1", "stage": "pretend", "host": "h", "processes": 1, "threads": 1}
STALE = OSError(errno.ESTALE, "Stale file handle")


class Watched:
    """A supervised job that lives for some polls, with what is done to it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.cancelled, self.starts, self.polls = path, 0, 0, 0
        self.seen: list[Progress] = []
        self.answers: list[object] = []
        """What each poll does: True is a live job, an exception is raised; after them, the job has ended."""
        self.paused = 0.0
        """Seconds of pauses before restarts, by a clock that only they move."""
        self.start_errors: list[OSError | None] = []
        self.lease_error: Exception | None = None
        (path / "logs").mkdir()
        self.job = Job.model_validate({**JOB, "log": str(path / "logs" / "pretend.log")})
        (path / "logs" / "pretend.log").write_text("")
        launch = {"restarts": 1, "restart_seconds": 0.0}
        self.config = RunConfig.model_validate({"run": {"root": str(path)}, "launch": launch})
        monkeypatch.setattr(supervisor, "attach_or_submit", self._start)
        monkeypatch.setattr(supervisor, "keep_lease", lambda job, control: nullcontext(self.check_lease))
        monkeypatch.setattr(supervisor, "poll", self._poll)
        monkeypatch.setattr(supervisor, "cancel", self._cancel)
        monkeypatch.setattr(supervisor, "collect", lambda job, control: [])
        monkeypatch.setattr(supervisor, "POLL_SECONDS", {"local": 0.0})
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        clock = SimpleNamespace(time=time.time, monotonic=lambda: self.paused, sleep=self._sleep)
        monkeypatch.setattr(restart_policy, "time", clock)

    def supervise(self, observe=None, **more) -> None:
        stage_job = StageJob(
            *(self.path, self.path / "logs", "pretend", "none", self.config),
            **{"complete": lambda: True, **more},
        )
        supervise(stage_job, observe or self.seen.append)

    def check_lease(self) -> None:
        if self.lease_error:
            raise self.lease_error

    def _start(self, stage_job: StageJob, observe: object, last: Job | None) -> Job:
        self.starts += 1
        if self.start_errors and (error := self.start_errors.pop(0)):
            raise error
        return self.job

    def _poll(self, job: Job) -> JobStatus:
        self.polls += 1
        answer = self.answers.pop(0) if self.answers else False
        if isinstance(answer, BaseException):
            raise answer
        return JobStatus(bool(answer))

    def _cancel(self, job: Job, control: Path) -> None:
        self.cancelled += 1

    def _sleep(self, seconds: float) -> None:
        self.paused += seconds


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_a_poll_that_fails_is_reported_once_and_the_job_goes_on(watched: Watched, caplog):
    watched.answers = [True, STALE, FileNotFoundError("squeue"), True]
    with caplog.at_level(logging.WARNING, "fm_core"):
        watched.supervise()
    assert (watched.cancelled, watched.polls) == (0, 5)
    assert [record.getMessage() for record in caplog.records] == [
        "cannot poll the job (OSError: [Errno 116] Stale file handle); trying again"
    ]


@pytest.mark.parametrize(
    "error", [STALE, BrokenPipeError(32, "Broken pipe"), SystemExit(1), ValueError("closed")]
)
def test_an_observer_that_fails_does_not_end_the_job(watched: Watched, error: BaseException):
    write_status(watched.path, Progress("pretend", 1, 2, "images"), job="a1")
    shown: list[Progress] = []

    def observe(progress: Progress) -> None:
        shown.append(progress)
        raise error

    watched.answers = [True, True, True]
    watched.supervise(observe)
    assert len(shown) >= 3
    assert watched.cancelled == 0


def test_a_status_that_cannot_be_read_does_not_end_the_job(watched: Watched, monkeypatch):
    def fail(control: Path) -> None:
        raise STALE

    monkeypatch.setattr(supervisor, "read_status", fail)
    watched.answers = [True, True]
    watched.supervise()
    assert watched.cancelled == 0


def test_the_last_status_is_shown_after_the_end_of_the_job(watched: Watched):
    """The job may end between two polls."""
    write_status(watched.path, Progress("pretend", 2, 2, "images"), job="a1")
    watched.supervise()
    assert [progress.fraction for progress in watched.seen] == [1.0]


@pytest.mark.parametrize("request_", [KeyboardInterrupt(), StopRequested("by the comparison")])
def test_only_a_request_cancels_the_job(watched: Watched, request_: BaseException):
    write_status(watched.path, Progress("pretend", 1, 2, "images"), job="a1")

    def observe(progress: Progress) -> None:
        raise request_

    watched.answers = [True, True]
    with pytest.raises(type(request_)):
        watched.supervise(observe)
    assert watched.cancelled == 1
    assert not (watched.path / "STOP").exists(), "it was handled"
    assert (watched.path / "STOPPED").exists()


@pytest.mark.parametrize(("error", "ends"), [(LeaseLostError("another host has it"), True), (STALE, False)])
def test_a_lost_lease_ends_the_job_and_one_that_cannot_be_read_does_not(watched: Watched, error, ends: bool):
    watched.answers, watched.lease_error = [True, True], error
    with pytest.raises(LeaseLostError) if ends else nullcontext():
        watched.supervise()
    assert watched.cancelled == ends


@pytest.mark.parametrize("submits", [True, False])
def test_a_signal_during_the_submission_leaves_no_job_and_touches_no_other(
    watched: Watched, monkeypatch, submits
):
    write_json(watched.path / "job.json", {**watched.job.model_dump(), "id": "of another start"})

    def interrupted(*_: object) -> None:
        if submits:
            write_json(watched.path / "job.json", watched.job.model_dump())
        raise KeyboardInterrupt

    monkeypatch.setattr(supervisor, "attach_or_submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watched.supervise()
    assert watched.cancelled == submits


def test_a_supervisor_that_cannot_continue_detaches_and_says_how_to_attach(watched: Watched, monkeypatch):
    def broken(seconds: float) -> None:
        raise RuntimeError("no clock")

    watched.answers = [True, True]
    monkeypatch.setattr(time, "sleep", broken)
    with pytest.raises(
        DetachedError, match=r"\(RuntimeError: no clock\); the job in .* is still running: attach"
    ) as caught:
        watched.supervise()
    assert f"fm pretend --config {watched.path / 'logs' / 'pretend.yaml'}" in str(caught.value)
    assert watched.cancelled == 0


@pytest.mark.parametrize("where", ["start", "end"])
def test_what_runs_beside_the_job_may_fail(watched: Watched, where: str):
    @contextmanager
    def meanwhile():
        if where == "start":
            raise OSError(errno.EAGAIN, "no process can start")
        yield
        raise OSError(errno.EIO, "Input/output error")

    watched.answers = [True]
    watched.supervise(meanwhile=meanwhile)
    assert watched.cancelled == 0


def test_a_restart_is_not_lost_to_a_record_that_cannot_be_written(watched: Watched, monkeypatch):
    def full(path: Path, record: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fm_core.launch.restart_policy.append_line", full)
    answers = [False, True]
    watched.supervise(complete=lambda: answers.pop(0), durable_progress=lambda: 1 // 0)
    assert watched.starts == 2


def test_a_restart_waits_for_a_full_disk_and_no_attempt_is_lost(watched: Watched):
    full = OSError(errno.ENOSPC, "No space left on device")
    watched.start_errors = [None, full, full, full, None]
    answers = [False, True]
    watched.supervise(complete=lambda: answers.pop(0))
    assert watched.starts == 5
    assert watched.paused == 1 + 2 + 4
    assert len(read_lines(watched.path / "logs" / "restarts.jsonl")) == 1
    assert any("cannot restart ([Errno 28]" in progress.message for progress in watched.seen)


def test_the_first_start_and_lasting_errors_are_raised(watched: Watched):
    for errors in ([OSError(errno.ENOSPC, "full")], [None, PermissionError(errno.EACCES, "not yours")]):
        watched.start_errors = list(errors)
        with pytest.raises(OSError, match=r"full|not yours"):
            watched.supervise(complete=lambda: False)


def test_a_stop_file_during_a_pause_ends_the_run_and_is_spent(watched: Watched):
    def complete() -> bool:
        (watched.path / "STOP").touch()
        return False

    with pytest.raises(StopRequested, match="stopped before a restart"):
        watched.supervise(complete=complete)
    assert watched.starts == 1
    assert not (watched.path / "STOP").exists()


def test_an_out_of_memory_kill_is_named(watched: Watched, monkeypatch):
    monkeypatch.setattr(supervisor.OomCounter, "new_kills", lambda self: 2)
    watched.config = watched.config.model_copy(
        update={"launch": watched.config.launch.model_copy(update={"restarts": 0})}
    )
    with pytest.raises(JobFailedError, match="out of memory: the kernel killed 2 processes of this host"):
        watched.supervise(complete=lambda: False)
