"""The process that goes on copying when a run was stopped before its store had everything, seen from the run.

It belongs to no job: whoever cancels a run ends all of its processes but this one, which ends by itself, at
the latest after LONGEST_SECONDS. Its record, train/afterwards.json, says what it does; whoever takes the
record away, as the next start does, ends it.
"""

import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from fm_core.config import RunConfig, Section, dump_yaml
from fm_core.run.directory import RunDirectory
from fm_core.run.files import read_json, write_json
from fm_core.run.job import CONTROL_VARIABLE, JOB_VARIABLE, LOGS_VARIABLE
from fm_core.run.lease import process_is

MODULE = "fm_core.training.afterwards"
LONGEST_SECONDS = 1800.0
SLURM = "SLURM_JOB_ID"
"""Slurm ends every process of a job with it."""
MARKS = (JOB_VARIABLE, CONTROL_VARIABLE, LOGS_VARIABLE)


class Afterwards(Section):
    """What is still being copied, or how that ended."""

    url: str
    host: str
    pid: int
    created: float
    """pid and start together name one process."""
    until: float
    """In seconds since 1970."""
    ended: bool = False
    problem: str | None = None
    """Why something was left for the next start, once it has ended."""


def begin_afterwards(config: RunConfig, seconds: float = LONGEST_SECONDS) -> str | None:
    """Start it on this host for at most so long; what it does, in words, or None where it cannot live."""
    if SLURM in os.environ:
        return None
    run = RunDirectory(config)
    log = run.log("train", "upload")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in MARKS},
        )
    keep_record(
        run.path,
        Afterwards(
            url=run.checkpoints,
            host=socket.gethostname(),
            pid=process.pid,
            created=psutil.Process(process.pid).create_time(),
            until=time.time() + seconds,
        ),
    )
    assert process.stdin
    with process.stdin as pipe:  # its file may be gone with the job
        pipe.write(dump_yaml(config).encode())
    return told_afterwards(run.path)


def told_afterwards(run: Path) -> str | None:
    """What is copied after a run's end, or how that went, in words; None where nothing was left to do."""
    record = recorded(run)
    if record is None:
        return None
    if record.problem or not (record.ended or _goes_on(record)):
        why = record.problem or "it was ended"
        return f"its upload to {record.url} was not finished ({why}); the next start does"
    if record.ended:
        return f"its upload to {record.url} was finished afterwards"
    latest = datetime.fromtimestamp(record.until, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"its upload to {record.url} goes on until {latest} at the latest (logs/train-upload.log)"


def end_afterwards(run: Path) -> None:
    """Have it end within a second, if it runs, wherever it does."""
    _path(run).unlink(missing_ok=True)


def recorded(run: Path) -> Afterwards | None:
    """Its record, or None."""
    record = read_json(_path(run))
    if record is None:
        return None
    record.pop("schema")
    return Afterwards.model_validate(record)


def keep_record(run: Path, record: Afterwards) -> None:
    """Write its record."""
    write_json(_path(run), record.model_dump())


def _goes_on(record: Afterwards) -> bool:
    if record.host == socket.gethostname():
        return process_is(record.pid, record.created)
    return time.time() < record.until


def _path(run: Path) -> Path:
    return run / "train" / "afterwards.json"
