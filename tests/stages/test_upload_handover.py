"""Upload handover: a detached process continues the upload of a stopped run whose store is unavailable."""

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.upload_record import UploadRecord, read_upload_record, write_upload_record
from fm_core.config import RunConfig
from fm_core.launch.dispatch import processes_of, submitted
from fm_core.launch.job import CONTROL_VARIABLE, JOB_VARIABLE, LOGS_VARIABLE, kill
from fm_core.launch.upload_handover import (
    LONGEST_SECONDS,
    SLURM,
    describe_upload,
    start_upload_worker,
    stop_upload_worker,
)
from fm_core.run.directory import RunDirectory
from fm_core.run.process_identity import ProcessIdentity
from fm_core.run.status import read_status
from fm_core.storage.atomic_files import read_lines, write_json
from tests.support.s3_server import Server
from tests.support.tiny_run import TinyRun

ENDLESS = {
    "checkpoint_root": "s3://bucket/stopped",
    "images": 16_000_000,
    "schedule": "constant",
    "log_images": 160,
    "checkpoint_images": 160_000,
    "validation_images": 0,
}


LIMIT_SECONDS = 300.0
"""For everything that is waited for; far longer than any of it takes."""


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(record: UploadRecord) -> bool:
    process = ProcessIdentity.from_record(record.model_dump())
    return process is not None and process.alive() is True


class Training:
    """`fm train` in a process of its own."""

    def __init__(self, run: TinyRun) -> None:
        self.run = run
        self.before = len(self.lines())
        self.process = run.start("train", AWS_MAX_ATTEMPTS="1")

    def works(self) -> "Training":
        until(lambda: len(self.lines()) > self.before)
        return self

    def lines(self) -> list[dict]:
        return read_lines(self.run.path / "train" / "metrics.jsonl")

    def stop(self) -> str:
        """Send SIGTERM; the last line on stderr."""
        self.process.send_signal(signal.SIGTERM)
        errors = self.process.communicate(timeout=LIMIT_SECONDS)[1].splitlines()
        assert self.process.returncode == 3
        assert processes_of(submitted(self.run.path)) == []
        return errors[-1]


@pytest.fixture(scope="module")
def run(tiny, s3) -> Iterator[TinyRun]:
    run = TinyRun(tiny.root, "stopped", {"train": ENDLESS, "launch": {"processes": 1}})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SLURM, raising=False)
        yield run
    stop_upload_worker(run.path)
    if job := submitted(run.path):
        kill(processes_of(job))


@pytest.fixture(scope="module")
def away(run: TinyRun, s3: Server) -> str:
    """The last line on stderr of a run that was stopped while the store was unavailable."""
    training = Training(run).works()
    s3.stop()
    return training.stop()


def test_the_last_line_names_the_destination_and_the_deadline(run: TinyRun, away: str):
    assert away.startswith("fm: stopped; its upload to s3://bucket/stopped continues until 20")
    record = read_upload_record(run.path)
    assert 0 < record.until - time.time() < LONGEST_SECONDS
    assert describe_upload(run.path) in away
    assert describe_upload(run.path) in run.fm("status").out
    process = psutil.Process(record.pid)
    assert process.is_running()
    assert not {JOB_VARIABLE, CONTROL_VARIABLE, LOGS_VARIABLE} & process.environ().keys()


def test_the_upload_ends_when_the_store_is_available_without_another_start(
    run: TinyRun, away: str, s3: Server
):
    record = read_upload_record(run.path)
    s3.start()
    until(lambda: read_upload_record(run.path).ended)
    assert describe_upload(run.path) == "its upload to s3://bucket/stopped was finished after the run ended"
    assert CheckpointCatalog.of(run.config).steps() == [read_status(run.path)["step"]]
    assert CheckpointCatalog.of(run.config).problem_of(read_status(run.path)["last_checkpoint"]) is None
    until(lambda: not alive(record))


def test_the_next_start_ends_it_and_copies_the_rest_itself(run: TinyRun, away: str, s3: Server):
    training = Training(run).works()
    s3.stop()
    training.stop()
    first, step = read_upload_record(run.path), read_status(run.path)["step"]
    assert alive(first)
    s3.start()
    training = Training(run).works()
    until(lambda: not alive(first))
    assert read_upload_record(run.path) is None
    until(lambda: step in CheckpointCatalog.of(run.config).steps())
    last = training.stop()
    # If the store answers in time, there is nothing to report; on a busy machine it may not.
    until(lambda: (left := read_upload_record(run.path)) is None or left.ended)
    assert ("upload" in last) == (read_upload_record(run.path) is not None)
    assert CheckpointCatalog.of(run.config).problem_of(read_status(run.path)["last_checkpoint"]) is None


def test_a_start_that_fails_gives_the_upload_back(run: TinyRun, away: str, s3: Server):
    step = read_status(run.path)["step"]
    s3.stop()
    try:
        assert "continues until" in start_upload_worker(run.config, step)
        first = read_upload_record(run.path)
        failed = run.fm("train", "--launch.restarts", "0", AWS_MAX_ATTEMPTS="1")
        assert failed.code != 0
        second = read_upload_record(run.path)
        assert second.pid != first.pid
        assert (second.step, second.ended) == (step, False)
    finally:
        s3.start()
    until(lambda: read_upload_record(run.path).ended)
    assert "was finished after the run ended" in describe_upload(run.path)


def test_it_ends_in_time_and_reports_the_cause(run: TinyRun, away: str, s3: Server, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.stop()
    try:
        assert "continues until" in start_upload_worker(run.config, step=1, seconds=3)
        until(lambda: read_upload_record(run.path).ended)
    finally:
        s3.start()
    description = describe_upload(run.path)
    assert description.startswith("its upload to s3://bucket/stopped was not finished (")
    assert description.endswith("); the next start continues it")


def test_an_upload_that_was_killed_is_not_reported_as_running(run: TinyRun, away: str):
    record = read_upload_record(run.path)
    write_upload_record(
        run.path,
        record.model_copy(update={"ended": False, "problem": None, "created": 1.0, "start_ticks": 1}),
    )
    assert "was not finished (its process was ended)" in describe_upload(run.path)


def test_under_slurm_nothing_is_begun_that_slurm_would_end(run: TinyRun, monkeypatch):
    monkeypatch.setenv(SLURM, "7")
    assert start_upload_worker(run.config, step=1) is None


def test_a_stop_succeeds_where_no_upload_process_can_be_started(run: TinyRun, away: str, monkeypatch, caplog):
    stop_upload_worker(run.path)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert start_upload_worker(run.config, step=1) is None
    assert "cannot start a process that continues the upload: " in caplog.text
    assert read_upload_record(run.path) is None


@pytest.fixture
def silent_store(tmp_path, monkeypatch) -> Iterator[RunConfig]:
    """A run with a checkpoint, and a store that is open and silent, so that every attempt times out."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = RunConfig.model_validate(
            {
                "run": {"root": str(tmp_path), "name": "silent"},
                "train": {"checkpoint_root": "s3://bucket/silent"},
            }
        )
        step = RunDirectory(config).path / "train" / "staging" / "step-00000001"
        write_json(step / "COMPLETE", {"files": {}})
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.delenv(SLURM, raising=False)
        yield config


def test_a_store_that_never_answers_is_left_when_the_time_is_over(silent_store: RunConfig):
    assert start_upload_worker(silent_store, step=1, seconds=8)
    path = RunDirectory(silent_store).path
    process = read_upload_record(path)
    until(lambda: read_upload_record(path).ended)
    assert "was not finished (" in describe_upload(path)
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
