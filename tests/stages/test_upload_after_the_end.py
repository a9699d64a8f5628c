"""A run that is stopped while its store is away: another process, of no job, goes on with the upload."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from s3_server import Server
from tiny_run import HERE, Tiny

from fm_core.run.afterwards import (
    LONGEST_SECONDS,
    SLURM,
    begin_afterwards,
    keep_record,
    recorded,
    told_afterwards,
)
from fm_core.run.files import read_lines
from fm_core.run.launch import processes_of, submitted
from fm_core.run.lease import process_is
from fm_core.run.status import read_status
from fm_core.training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

ENDLESS = {
    "checkpoint_root": "s3://bucket/stopped",
    "images": 16_000_000,
    "schedule": "constant",
    "log_images": 160,
    "checkpoint_images": 160_000,
    "held_out_images": 0,
}


def until(happened: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Training:
    """`fm train` in a process of its own."""

    def __init__(self, run: Tiny) -> None:
        self.run = run
        before = len(self.lines())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fm_core", "train", "--config", str(run.file)],
            cwd=run.root,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "AWS_MAX_ATTEMPTS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: len(self.lines()) > before, 90)

    def lines(self) -> list[dict]:
        return read_lines(self.run.path / "train" / "metrics.jsonl")

    def stop(self) -> str:
        """SIGTERM; what it says last."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=60)[1].splitlines()
        assert time.monotonic() - began < 25
        assert self.process.returncode == 3
        assert processes_of(submitted(self.run.path)) == []
        return said[-1]


@pytest.fixture(scope="module")
def run(tiny, s3) -> Tiny:
    return Tiny(tiny.root, "stopped", {"train": ENDLESS})


@pytest.fixture(scope="module")
def away(run: Tiny, s3: Server) -> str:
    """What was said when the run was stopped while the store was away."""
    training = Training(run)
    s3.stop()
    return training.stop()


def test_its_last_words_name_the_place_and_the_latest_end(run: Tiny, away: str):
    assert away.startswith("fm: stopped; its upload to s3://bucket/stopped goes on until 20")
    record = recorded(run.path)
    assert 0 < record.until - time.time() < LONGEST_SECONDS
    assert told_afterwards(run.path) in away
    assert told_afterwards(run.path) in run.fm("status").out
    process = psutil.Process(record.pid)
    assert process.is_running()
    assert not [name for name in process.environ() if name.startswith("FM_")]


def test_the_upload_ends_with_the_store_back_and_nobody_started_anything(run: Tiny, away: str, s3: Server):
    record = recorded(run.path)
    s3.start()
    until(lambda: recorded(run.path).ended, 90)
    assert told_afterwards(run.path) == "its upload to s3://bucket/stopped was finished afterwards"
    assert Checkpoints.of(run.config).steps() == [read_status(run.path)["step"]]
    assert Checkpoints.of(run.config).problem_of(read_status(run.path)["last_checkpoint"]) is None
    until(lambda: not process_is(record.pid, record.created), 10)


def test_the_next_start_ends_it_and_copies_the_rest_itself(run: Tiny, away: str, s3: Server):
    training = Training(run)
    s3.stop()
    training.stop()
    record = recorded(run.path)
    assert process_is(record.pid, record.created)
    s3.start()
    training = Training(run)
    until(lambda: not process_is(record.pid, record.created), 5)
    last = training.stop()
    assert "upload" not in last  # it took no longer than a stop may
    assert told_afterwards(run.path) is None
    assert Checkpoints.of(run.config).problem_of(read_status(run.path)["last_checkpoint"]) is None


def test_it_ends_in_time_and_says_what_was_in_the_way(run: Tiny, away: str, s3: Server, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.stop()
    try:
        assert "goes on until" in begin_afterwards(run.config, seconds=3)
        until(lambda: recorded(run.path).ended, 40)
    finally:
        s3.start()
    told = told_afterwards(run.path)
    assert told.startswith("its upload to s3://bucket/stopped was not finished (")
    assert told.endswith("); the next start does")


def test_one_that_was_killed_is_not_said_to_go_on(run: Tiny, away: str):
    record = recorded(run.path)
    keep_record(run.path, record.model_copy(update={"ended": False, "problem": None, "created": 1.0}))
    assert "was not finished (it was ended)" in told_afterwards(run.path)


def test_under_slurm_nothing_is_begun_that_slurm_would_end(run: Tiny, monkeypatch):
    monkeypatch.setenv(SLURM, "7")
    assert begin_afterwards(run.config) is None
