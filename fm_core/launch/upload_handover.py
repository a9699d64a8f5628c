"""The process that goes on copying when a run was stopped before its store had everything, seen from the run.

It belongs to no job: whoever cancels a run ends all of its processes but this one, which ends by itself, at
the latest after LONGEST_SECONDS. Its record, train/afterwards.json, says what it does and is touched while it
lives; whoever takes the record away, as the next start does, ends it.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from fm_core.config import RunConfig, Section, dump_yaml
from fm_core.errors import UserError
from fm_core.launch.detached import spawn_detached
from fm_core.launch.job import CONTROL_VARIABLE, JOB_VARIABLE, LOGS_VARIABLE
from fm_core.run.directory import RunDirectory
from fm_core.run.lease import STALE_SECONDS, process_is
from fm_core.storage.atomic_files import read_json, write_json

MODULE = "fm_core.checkpoint.upload_worker"
LONGEST_SECONDS = 1800.0
SLURM = "SLURM_JOB_ID"
"""Slurm ends every process of a job with it."""
MARKS = (JOB_VARIABLE, CONTROL_VARIABLE, LOGS_VARIABLE)


class UploadRecord(Section):
    """What is still being copied, or how that ended."""

    url: str
    step: int
    """Where training stopped; later checkpoints were found damaged."""
    host: str
    pid: int
    created: float
    """pid and start together name one process."""
    until: float
    """In seconds since 1970."""
    ended: bool = False
    problem: str | None = None
    """Why something was left for the next start, once it has ended."""


def start_upload_worker(config: RunConfig, step: int, seconds: float = LONGEST_SECONDS) -> str | None:
    """Start it on this host for at most so long; what it does, in words, or None where it cannot live."""
    if SLURM in os.environ:
        return None
    run = RunDirectory(config)
    try:
        process = _started(run)
    except OSError as error:
        print(f"warning: no process goes on with the upload: {error}", flush=True)
        return None
    try:
        record = UploadRecord(
            url=run.checkpoints,
            step=step,
            host=socket.gethostname(),
            pid=process.pid,
            created=psutil.Process(process.pid).create_time(),
            until=time.time() + seconds,
        )
        write_upload_record(run.path, record)
        assert process.stdin
        with process.stdin as pipe:  # the job's own file may be gone with the job
            pipe.write(dump_yaml(config).encode())
    except (OSError, psutil.Error) as error:
        print(f"warning: no process goes on with the upload: {error}", flush=True)
        process.kill()
        stop_upload_worker(run.path)
        return None
    return describe_upload(run.path)


def _started(run: RunDirectory) -> subprocess.Popen[bytes]:
    log = run.log("train", "upload")
    log.parent.mkdir(parents=True, exist_ok=True)
    return spawn_detached([sys.executable, "-m", MODULE], log, without=MARKS, stdin=subprocess.PIPE)


def describe_upload(run: Path) -> str | None:
    """What is copied after a run's end, or how that went, in words; None where nothing was left to do."""
    record = read_upload_record(run)
    if record is None:
        return None
    if record.problem or not (record.ended or _goes_on(run, record)):
        why = record.problem or "it was ended"
        return f"its upload to {record.url} was not finished ({why}); the next start does"
    if record.ended:
        return f"its upload to {record.url} was finished afterwards"
    latest = datetime.fromtimestamp(record.until, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"its upload to {record.url} goes on until {latest} at the latest (logs/train-upload.log)"


def stop_upload_worker(run: Path) -> int | None:
    """Have it end within a second, if it runs, wherever it does; the step it had not finished, if any."""
    record = read_upload_record(run)
    with suppress(OSError):
        _path(run).unlink()
    return record.step if record and (record.problem or not record.ended) else None


def read_upload_record(run: Path) -> UploadRecord | None:
    """Its record; None where there is none that can be read."""
    try:
        record = read_json(_path(run))
        if record is None:
            return None
        record.pop("schema")
        return UploadRecord.model_validate(record)
    except (OSError, ValueError, UserError):
        return None


def write_upload_record(run: Path, record: UploadRecord) -> None:
    """Write its record."""
    write_json(_path(run), record.model_dump())


def touch_upload_record(run: Path) -> bool:
    """Say that it lives, for readers on other hosts; False where the record was taken away."""
    try:
        os.utime(_path(run))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a file system that is away for a moment
    return True


def _goes_on(run: Path, record: UploadRecord) -> bool:
    if record.host == socket.gethostname():
        return process_is(record.pid, record.created)
    with suppress(OSError):
        return time.time() - _path(run).stat().st_mtime < STALE_SECONDS
    return False


def _path(run: Path) -> Path:
    return run / "train" / "afterwards.json"
