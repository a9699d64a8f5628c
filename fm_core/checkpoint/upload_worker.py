"""Worker that uploads the checkpoints a stopped run left behind; reads the configuration from stdin.

fm_core.launch.upload_handover starts and describes it, fm_core.checkpoint.upload_record is its record.
"""

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import yaml

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.upload_record import (
    UploadRecord,
    read_upload_record,
    touch_upload_record,
    upload_record_path,
    write_upload_record,
)
from fm_core.config import parse_config
from fm_core.errors import LeaseLostError, UserError
from fm_core.output import log_to_stderr
from fm_core.run.directory import RunDirectory, step_name

LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often the worker checks that its record still exists."""
RETRY_SECONDS = 10.0
"""Pause between two attempts to list a store."""
MARGIN_SECONDS = 5.0
"""How long after its deadline the worker waits for a store that does not answer."""


def main() -> None:
    """Upload until everything is in the store, the deadline has passed, or the record is gone."""
    log_to_stderr(logging.INFO)
    config = parse_config(yaml.safe_load(sys.stdin), "standard input")
    run = RunDirectory(config).path
    record = read_upload_record(run)
    if record is None or record.pid != os.getpid():
        return
    threading.Thread(target=_watch_record, args=(run, record), daemon=True).start()
    fence = UploadFence(run, record)
    checkpoints = CheckpointCatalog.of(config, fence)
    snapshots = [checkpoints.snapshots()] if config.train.snapshot_images else []
    problems = [
        problem
        for catalog in (checkpoints, *snapshots)
        if (problem := _upload(catalog, record, check_last=catalog is checkpoints))
    ]
    _end(run, record, "; ".join(problems) or None)


class UploadFence:
    """Fence of the upload worker: it may upload until the next start of the run removes the record."""

    def __init__(self, run: Path, record: UploadRecord) -> None:
        self.job, self.epoch = f"upload-{record.pid}", 0
        self._run, self._pid = run, record.pid

    def check(self) -> None:
        """Raise LeaseLostError once the record is gone or another worker's; OSError if it cannot be read."""
        record = read_upload_record(self._run)
        if record is None and upload_record_path(self._run).exists():
            raise OSError(f"{upload_record_path(self._run)} cannot be read")
        if record is None or record.pid != self._pid:
            raise LeaseLostError("the run was started again and uploads the rest itself")


def _upload(catalog: CheckpointCatalog, record: UploadRecord, check_last: bool) -> str | None:
    """Upload what is queued; return why that failed, the problem of the last checkpoint there, or None."""
    while True:
        try:
            catalog.catch_up(newest=record.step)
            problem = catalog.wait(max(record.until - time.time(), 0))
            return problem or (catalog.problem_of(step_name(record.step)) if check_last else None)
        except LeaseLostError as error:
            return str(error)
        except (OSError, UserError) as error:
            if time.time() + RETRY_SECONDS > record.until:
                return " ".join(str(error).split())
            LOG.warning("%s; retrying the upload in %g s", error, RETRY_SECONDS)
            time.sleep(RETRY_SECONDS)


def _watch_record(run: Path, record: UploadRecord) -> None:
    """End the process when its record is removed or its deadline has passed, even during a blocking call."""
    while touch_upload_record(run):
        if time.time() > record.until + MARGIN_SECONDS:
            _end(run, record, f"{record.url} did not answer in time")
        time.sleep(POLL_SECONDS)
    _print("the run was started again and uploads the rest itself")
    os._exit(0)


def _end(run: Path, record: UploadRecord, problem: str | None) -> None:
    """Record how the upload ended, unless a new start has removed the record, and exit at once."""
    with suppress(OSError):
        if touch_upload_record(run):
            write_upload_record(run, record.model_copy(update={"ended": True, "problem": problem}))
    _print(problem or f"everything is in {record.url}")
    os._exit(0)


def _print(text: str) -> None:
    with suppress(OSError):  # the log may be on a full disk
        print(text, flush=True)


if __name__ == "__main__":
    main()
