"""History of a run's training in train/history.json: its identity and its last completed checkpoint.

The history, not the files that are visible at the moment, decides where training may start: a run that has
completed a checkpoint never starts at step 0 because a disk is not mounted. Importing this module does not
import torch.
"""

import json
import uuid
from pathlib import Path

from pydantic import ValidationError

from fm_core.config import Section
from fm_core.errors import UnreachableError, UserError
from fm_core.storage.atomic_files import SCHEMA, create_exclusively, read_json, sync, write_json

OWNER = "OWNER.json"
"""Owner record of a checkpoint root; see checkpoint/ownership.py."""


class RunHistory(Section):
    """What a run directory records about its training, independent of what is mounted."""

    id: str
    """Random id that distinguishes this run from others of the same name and configuration."""
    completed_step: int | None = None
    """Step of the last completed checkpoint; None if there never was one."""
    completed_at: str | None = None
    """URL or folder of that checkpoint."""
    start_overs: int = 0
    """How often train.start_over has restarted training at step 0."""
    start_over_obeyed: bool = False
    """Whether train.start_over, if set, was already applied."""


def history_path(run: Path) -> Path:
    """Path of the history in a run directory."""
    return run / "train" / "history.json"


def read_history(run: Path) -> RunHistory | None:
    """The history of a run directory; None if it was never trained by a version that writes one."""
    record = read_json(history_path(run))
    if record is None:
        return None
    try:
        return RunHistory.model_validate({key: value for key, value in record.items() if key != "schema"})
    except ValidationError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{history_path(run)} was written by another version: {message}") from None


def open_history(run: Path, identifier: str | None = None) -> RunHistory:
    """The history of a run directory, created if missing.

    A new history includes the results of earlier versions. `identifier` is the id of the run if its history
    was lost. Raises OSError, UserError.
    """
    history = read_history(run)
    if history is None:
        new = RunHistory(id=identifier or uuid.uuid4().hex, completed_step=_completed_before(run))
        content = json.dumps({"schema": SCHEMA, **new.model_dump()}, indent=1) + "\n"
        create_exclusively(history_path(run), content.encode())
        history = read_history(run)  # of two concurrent starts, the first one wins
    if history is None:
        raise UnreachableError(f"{history_path(run)} is missing; check that the run directory is mounted")
    return history


def rearm_start_over(run: Path) -> None:
    """At a start without train.start_over, make the next train.start_over effective. Raises OSError."""
    history = read_history(run)
    if history and history.start_over_obeyed:
        write_history(run, history.model_copy(update={"start_over_obeyed": False}))


def preserve_history(run: Path, checkpoints: Path | None) -> None:
    """Write the history of a trained run without one, before its status file is replaced.

    Earlier versions wrote none. If it was lost, the id is in the owner record in the folder `checkpoints` of
    the run, if there is one. Raises OSError, UserError.
    """
    if not history_path(run).exists() and _completed_before(run) is not None:
        owner = (read_json(checkpoints / OWNER) if checkpoints else None) or {}
        open_history(run, owner.get("run", {}).get("id"))


def record_completed(run: Path, identifier: str, step: int, where: str) -> None:
    """Record durably that the checkpoint of a step is complete.

    Raises UnreachableError if the run directory is unavailable, OSError if it cannot be written.
    """
    history = read_history(run)
    if history is None or history.id != identifier:
        raise UnreachableError(f"{history_path(run)} is missing; check that the run directory is mounted")
    write_history(run, history.model_copy(update={"completed_step": step, "completed_at": where}))


def write_history(run: Path, history: RunHistory) -> None:
    """Write the history durably. Raises OSError."""
    path = history_path(run)
    write_json(path, history.model_dump())
    sync(path.parent)


def _completed_before(run: Path) -> int | None:
    """Step of the last checkpoint that a run completed under a version without history.json."""
    steps = [
        _step(run / "status.json", "last_checkpoint"),
        _step(run / "train" / "DONE.json", "step"),
        # A rollback or an upload implies that there was a checkpoint.
        _step(run / "train" / "setback.json", "step"),
        _step(run / "train" / "afterwards.json", "step"),
        _step(run / "best.json", "step"),
    ]
    return max((step for step in steps if step is not None), default=None)


def _step(path: Path, key: str) -> int | None:
    """The step in a record, given as a number or as the name of a checkpoint."""
    try:
        value = (read_json(path) or {}).get(key)
    except UserError:
        return None
    digits = str(value).rpartition("-")[2]
    return int(digits) if digits.isdecimal() else None
