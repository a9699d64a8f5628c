"""`fm status` of a run that is dead, restarting, or on another host."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fm_core.config import RunConfig
from fm_core.launch.run_liveness import death_notice
from fm_core.run.lease import Lease
from fm_core.run.progress import Progress
from fm_core.run.status import read_status, write_status
from fm_core.status_line import show_status
from fm_core.storage.atomic_files import append_line, write_json, write_text

PROGRESS = Progress("train", 120, 500, "images", "step 12, loss 0.5", rate=3.0)
FACTS = {"id": "a1", "stage": "train", "host": socket.gethostname(), "processes": 1, "threads": 1, "log": "x"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def agent(alive: bool) -> dict[str, float]:
    """The agent of a job: this process, or one that has ended."""
    if alive:
        return {"pid": os.getpid(), "created": psutil.Process().create_time()}
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    created = psutil.Process(ended.pid).create_time()
    ended.wait()
    return {"pid": ended.pid, "created": created}


def notice(run: Path, later: float = 0.0) -> str | None:
    status = read_status(run)
    assert status
    return death_notice(run, status, time.time() + later)


@pytest.mark.parametrize("file", ["config.yaml", "logs/train.yaml", None])
def test_the_command_to_continue_names_a_file_that_is_there(run: Path, file: str | None, capsys):
    """config.yaml is written after the first step, that of the stage when its job is submitted."""
    write_status(run, PROGRESS, job="a1")
    write_json(run / "job.json", {**FACTS, **agent(False)})
    if file:
        write_text(run / file, "")
    show_status(RunConfig.model_validate({"run": {"root": str(run.parent), "name": "run"}}), False)
    line = capsys.readouterr().out.strip()
    assert line.endswith(f"loss 0.5; to continue: fm train --config {run / file}" if file else "loss 0.5")


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_whose_job_is_gone_is_dead(run: Path, alive: bool, capsys):
    write_text(run / "config.yaml", "")
    write_text(run / "logs" / "train.yaml", "")
    write_status(run, PROGRESS, job="a1")
    write_json(run / "job.json", {**FACTS, **agent(alive)})
    assert (notice(run) is None) is alive
    assert (
        show_status(RunConfig.model_validate({"run": {"root": str(run.parent), "name": "run"}}), False) == 0
    )
    line = capsys.readouterr().out.strip()
    if alive:
        assert line == "train running: 120/500 images, 3 images/s, 0:02:07 left, step 12, loss 0.5"
    else:
        assert line.startswith("train dead: it has no running process; last activity at 20")
        assert line.endswith(
            f"ago, at 120/500 images, step 12, loss 0.5; to continue: fm train --config {run / 'config.yaml'}"
        )
        assert " left" not in line


@pytest.mark.parametrize("phase", ["done", "stopped", "failed"])
def test_a_run_that_has_ended_is_not_called_dead(run: Path, phase: str):
    write_status(run, PROGRESS, phase, job="a1")
    assert notice(run) is None


def test_a_job_in_the_pause_before_a_restart_is_not_dead(run: Path):
    write_status(run, PROGRESS, job="a1")
    write_json(run / "job.json", {**FACTS, **agent(False)})
    restart = {"stage": "train", "failed": time.time(), "pause_seconds": 300.0}
    append_line(run / "logs" / "restarts.jsonl", restart)
    assert notice(run) is None
    assert notice(run, later=400.0)


def test_a_job_of_another_host_lives_as_long_as_its_lease(run: Path):
    write_status(run, PROGRESS, job="a1")
    write_json(run / "job.json", {**FACTS, **agent(True), "host": "elsewhere"})
    assert notice(run)
    Lease(run / "lock").take_for("elsewhere", job="a1", stage="train")
    assert notice(run) is None


@pytest.mark.parametrize("alive", [True, False])
def test_a_stage_without_a_job_lives_as_long_as_its_process(run: Path, alive: bool):
    supervisor = {"host": socket.gethostname(), **agent(alive)}
    write_status(run, Progress("shard", 1, 2, "images"), supervisor=supervisor)
    assert (notice(run) is None) is alive
    write_status(run, Progress("shard", 1, 2, "images"))  # of an earlier version, which did not say
    assert notice(run) is None


def test_a_job_file_that_cannot_be_read_proves_nothing(run: Path):
    write_status(run, PROGRESS, job="a1")
    (run / "job.json").write_text('{"schema": 99}')
    assert notice(run) is None
