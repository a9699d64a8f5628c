"""Status file of a run, status.json."""

import time
from pathlib import Path
from typing import Any

from fm_core.run.progress import Progress
from fm_core.storage.atomic_files import read_json, write_json


def write_status(directory: Path, progress: Progress, phase: str = "running", **facts: Any) -> None:
    """Write the current state; `facts` are further entries such as step, images_seen and loss."""
    record: dict[str, Any] = {
        "stage": progress.stage,
        "phase": phase,
        "done": progress.done,
        "total": progress.total,
        "unit": progress.unit,
        "message": progress.message,
        **facts,
        "updated": time.time(),
    }
    if progress.rate is not None:
        record |= {"rate": progress.rate, "eta_seconds": progress.eta}
    write_json(directory / "status.json", record)


def read_status(directory: Path) -> dict[str, Any] | None:
    """The current state, or None before the first stage."""
    return read_json(directory / "status.json")


def progress_of(status: dict[str, Any]) -> Progress:
    """The progress in a status."""
    return Progress(
        stage=status["stage"],
        done=status["done"],
        total=status["total"],
        unit=status["unit"],
        message=status["message"],
        rate=status.get("rate"),
    )
