"""Status file: what a run is doing now, in status.json."""

import time
from pathlib import Path
from typing import Any

from fm_core.run.progress import Progress
from fm_core.storage.atomic_files import read_json, write_json


def write_status(directory: Path, progress: Progress, phase: str = "running", **facts: Any) -> None:
    """Write the present state; `facts` are step, images_seen, loss and the like."""
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
    """The present state, or None before the first stage."""
    return read_json(directory / "status.json")


def progress_of(status: dict[str, Any]) -> Progress:
    """The part of a status that an observer sees."""
    return Progress(
        stage=status["stage"],
        done=status["done"],
        total=status["total"],
        unit=status["unit"],
        message=status["message"],
        rate=status.get("rate"),
    )
