"""Handover of an unfinished upload to a separate process when a run stops.

The worker (fm_core.checkpoint.upload_worker) belongs to no job: canceling a run ends all of its processes but
this one, which exits when it is done, or after LONGEST_SECONDS. Its record (fm_core.checkpoint.upload_record)
describes its state; removing the record, as the next start does, ends it.
"""

import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from fm_core.checkpoint.upload_record import (
    UploadRecord,
    read_upload_record,
    remove_upload_record,
    upload_record_path,
    write_upload_record,
)
from fm_core.config import RunConfig, dump_yaml
from fm_core.launch.detached import spawn_detached
from fm_core.launch.job import CONTROL_VARIABLE, JOB_VARIABLE, LOGS_VARIABLE
from fm_core.run.directory import RunDirectory
from fm_core.run.lease import STALE_SECONDS
from fm_core.run.process_identity import ProcessIdentity

LOG = logging.getLogger(__name__)

MODULE = "fm_core.checkpoint.upload_worker"
LONGEST_SECONDS = 1800.0
SLURM = "SLURM_JOB_ID"
"""Slurm ends every process of a job together with the job."""
MARKS = (JOB_VARIABLE, CONTROL_VARIABLE, LOGS_VARIABLE)


def start_upload_worker(config: RunConfig, step: int, seconds: float = LONGEST_SECONDS) -> str | None:
    """Start the worker on this host for at most `seconds`.

    Returns a message about what it does, or None if it cannot be started or would not survive.
    """
    if SLURM in os.environ:
        return None
    run = RunDirectory(config)
    try:
        process = _spawn(run)
    except OSError as error:
        LOG.warning("cannot start a process that continues the upload: %s", error)
        return None
    try:
        record = UploadRecord(
            url=run.checkpoints,
            step=step,
            until=time.time() + seconds,
            **ProcessIdentity.of(process.pid).facts(),
        )
        write_upload_record(run.path, record)
        assert process.stdin
        with process.stdin as pipe:  # the job's own file may be deleted with the job
            pipe.write(dump_yaml(config).encode())
    except (OSError, psutil.Error) as error:
        LOG.warning("cannot start a process that continues the upload: %s", error)
        process.kill()
        stop_upload_worker(run.path)
        return None
    return describe_upload(run.path)


def describe_upload(run: Path) -> str | None:
    """Message about the upload after a run's end, or its result; None if there was nothing to upload."""
    record = read_upload_record(run)
    if record is None:
        return None
    if record.problem or not (record.ended or _is_alive(run, record)):
        reason = record.problem or "its process was ended"
        return f"its upload to {record.url} was not finished ({reason}); the next start continues it"
    if record.ended:
        return f"its upload to {record.url} was finished after the run ended"
    latest = datetime.fromtimestamp(record.until, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"its upload to {record.url} continues until {latest} at the latest (logs/train-upload.log)"


def stop_upload_worker(run: Path) -> int | None:
    """Make the worker, if it runs on any host, exit within a second.

    Returns the step that it had not finished uploading, if any.
    """
    record = read_upload_record(run)
    remove_upload_record(run)
    return record.step if record and (record.problem or not record.ended) else None


def _spawn(run: RunDirectory) -> subprocess.Popen[bytes]:
    log = run.log("train", "upload")
    log.parent.mkdir(parents=True, exist_ok=True)
    return spawn_detached([sys.executable, "-m", MODULE], log, without=MARKS, stdin=subprocess.PIPE)


def _is_alive(run: Path, record: UploadRecord) -> bool:
    process = ProcessIdentity.from_record(record.model_dump())
    if process and process.here:
        return process.alive() is not False
    with suppress(OSError):
        return time.time() - upload_record_path(run).stat().st_mtime < STALE_SECONDS
    return False
