"""Record of an upload that continues after its run has ended: train/afterwards.json.

The upload worker touches it periodically. Removing the record makes the worker exit, so the next start of the
run removes it. Importing this module does not import torch.
"""

import os
from contextlib import suppress
from pathlib import Path

from fm_core.config import Section
from fm_core.errors import UserError
from fm_core.storage.atomic_files import read_json, write_json


class UploadRecord(Section):
    """State of an upload that continues, or its result."""

    url: str
    step: int
    """Where training stopped; later checkpoints were found damaged."""
    host: str
    pid: int
    created: float
    """Start of the process in seconds since 1970."""
    host_id: str | None = None
    """Boot and PID namespace of its host; None in a record of an earlier version."""
    start_ticks: int | None = None
    """Start of the process in clock ticks since boot; pid and start together name one process."""
    until: float
    """Deadline of the worker, in seconds since 1970."""
    ended: bool = False
    problem: str | None = None
    """After the worker has ended: why the next start has to upload the rest."""


def upload_record_path(run: Path) -> Path:
    """Path of the record in a run directory."""
    return run / "train" / "afterwards.json"


def read_upload_record(run: Path) -> UploadRecord | None:
    """The record of a run directory; None if it is missing or cannot be read."""
    try:
        record = read_json(upload_record_path(run))
        if record is None:
            return None
        record.pop("schema")
        return UploadRecord.model_validate(record)
    except (OSError, ValueError, UserError):
        return None


def write_upload_record(run: Path, record: UploadRecord) -> None:
    """Write the record of a run directory."""
    write_json(upload_record_path(run), record.model_dump())


def remove_upload_record(run: Path) -> None:
    """Remove the record, which makes its worker exit within a second wherever it runs."""
    with suppress(OSError):
        upload_record_path(run).unlink()


def touch_upload_record(run: Path) -> bool:
    """Update the record's mtime, by which other hosts see that the worker lives; False if it was removed."""
    try:
        os.utime(upload_record_path(run))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a file system that is temporarily unavailable
    return True
