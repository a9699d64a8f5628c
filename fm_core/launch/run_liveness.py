"""Liveness of a run, for `fm status`, since status.json still says "running" after a crash."""

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fm_core.errors import UserError
from fm_core.launch.dispatch import alive, submitted
from fm_core.launch.run_jobs import control_directories
from fm_core.run.lease import STALE_SECONDS, Lease
from fm_core.run.process_identity import ProcessIdentity
from fm_core.storage.atomic_files import read_lines

RESTART_SECONDS = 60.0
"""Seconds that a restart may take beyond its pause."""


def death_notice(run: Path, status: dict[str, Any], now: float | None = None) -> str | None:
    """Why, and since when, a run whose status says "running" is dead; None if it may be running.

    Args:
        run: the run directory.
        status: its status.json.
        now: seconds since 1970; by default the current time.
    """
    now = time.time() if now is None else now
    if status.get("phase") != "running" or any(_lives(control) for control in control_directories(run)):
        return None
    silence = now - status["updated"]
    supervisor = status.get("supervisor")
    if supervisor and _supervisor_lives(supervisor, silence):
        return None
    if _restarts(run, status["stage"], now) or (not supervisor and "job" not in status):
        return None
    since = datetime.fromtimestamp(status["updated"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    ago = timedelta(seconds=max(0, round(silence)))
    return f"dead: it has no running process; last activity at {since}, {ago} ago"


def _lives(control: Path) -> bool:
    """Whether the job of a control directory runs or is queued; True if that cannot be determined."""
    try:
        job = submitted(control)
        if job is None:
            return False
        return alive(job) or Lease(control / "lock").holder() is not None
    except (OSError, UserError):
        return True


def _supervisor_lives(supervisor: dict[str, Any], silence: float) -> bool:
    """Whether the supervisor of a stage is alive; on another host, whether its status is recent."""
    process = ProcessIdentity.from_record(supervisor)
    if process is None or not process.here:
        return silence < STALE_SECONDS
    return process.alive() is not False


def _restarts(run: Path, stage: str, now: float) -> bool:
    """Whether the job is in the pause before a restart."""
    with suppress(OSError, KeyError):
        records = [
            record for record in read_lines(run / "logs" / "restarts.jsonl") if record["stage"] == stage
        ]
        return bool(records) and now < records[-1]["failed"] + records[-1]["pause_seconds"] + RESTART_SECONDS
    return False
