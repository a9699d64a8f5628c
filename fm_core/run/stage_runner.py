"""Stage runner: checks the run directory, measures time, and appends to logs/stages.jsonl."""

import os
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from fm_core.config import RunConfig
from fm_core.errors import LeaseLostError, StopRequested, UserError
from fm_core.run.best_effort import BestEffort
from fm_core.run.directory import RunDirectory
from fm_core.run.lease import Lease
from fm_core.run.process_identity import ProcessIdentity
from fm_core.run.progress import Observer, Progress
from fm_core.run.resource_limits import raise_open_file_limit
from fm_core.run.results import StageResult
from fm_core.run.status import read_status, write_status
from fm_core.storage.atomic_files import append_line, write_json

STATUS_SECONDS = 1.0

Work = Callable[[RunDirectory, Observer], StageResult]


def run_stage_function(stage: str, config: RunConfig, observe: Observer, work: Work) -> StageResult:
    """Check the run directory, do the work, and append a line to logs/stages.jsonl even if it fails.

    The work calls `run.begin()` after the last check of its configuration. A start that fails earlier leaves
    no files.
    """
    run = RunDirectory(config)
    run.check()
    lease = Lease(run.path / "lock")
    began, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    outcome = {"state": "failed", "summary": ""}
    effort = BestEffort()
    raise_open_file_limit()
    try:
        result = work(run, _with_status(run, lease, observe, effort))
        result = result.model_copy(update={"seconds": round(time.monotonic() - clock, 3)})
        outcome = {"state": result.state, "summary": result.summary}
        effort.call("write the status", lambda: _end_status(run, lease, stage, "done"), None)
        return result
    except BaseException as error:
        outcome["summary"] = f"{type(error).__name__}: {error}".splitlines()[0]
        # A BaseException that is not an Exception comes from a signal: Ctrl-C, a canceled flow run.
        on_request = isinstance(error, StopRequested) or not isinstance(error, Exception)
        outcome["state"] = "stopped" if on_request else "failed"
        if isinstance(error, Exception) and not isinstance(error, StopRequested | UserError | LeaseLostError):
            trace = traceback.format_exc()
            effort.call("write the log of errors", lambda: _log_error(run, stage, trace), None)
        effort.call("write the status", lambda: _end_status(run, lease, stage, outcome["state"]), None)
        raise
    finally:
        if run.begun:
            seconds = round(time.monotonic() - clock, 3)
            record = {"stage": stage, "began": began, "seconds": seconds, **outcome}
            effort.call("record the stage", lambda: append_line(run.history, record), None)


def _log_error(run: RunDirectory, stage: str, text: str) -> None:
    run.begin()
    with run.log(stage, "error").open("a", encoding="utf-8") as log:
        log.write(text)


def _end_status(run: RunDirectory, lease: Lease, stage: str, phase: str) -> None:
    """Write the final phase to status.json, unless a job still runs."""
    status = read_status(run.path) if run.begun else None
    if status and status["stage"] == stage and lease.holder() is None:
        status.pop("schema")
        write_json(run.path / "status.json", {**status, "phase": phase})


def _is_newer(status: dict[str, Any] | None, progress: Progress) -> bool:
    """Whether the status of an ended job contains more than this progress: its step, and as many images."""
    if status is None or status["stage"] != progress.stage or "step" not in status:
        return False
    return status["done"] >= progress.done


def _is_inner(status: dict[str, Any] | None, progress: Progress, supervisor: Mapping[str, Any]) -> bool:
    """Whether another stage of this process, whose status this is, runs the stage of this progress."""
    if status is None or status["stage"] == progress.stage or status.get("phase") != "running":
        return False
    return status.get("supervisor") == supervisor


def _with_status(run: RunDirectory, lease: Lease, observe: Observer, effort: BestEffort) -> Observer:
    """Wrap an observer to also write status.json, unless a job or a sweep runs, which then writes it.

    A failure to write or show is logged once; a request to stop from the observer is raised.
    """
    last = 0.0
    supervisor = ProcessIdentity.of(os.getpid()).facts()

    def write(progress: Progress) -> None:
        status = read_status(run.path)
        superseded = _is_newer(status, progress) or _is_inner(status, progress, supervisor)
        if lease.holder() is None and not superseded:
            write_status(run.path, progress, supervisor=supervisor)

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        finished = progress.done >= progress.total
        if run.begun and (now - last > STATUS_SECONDS or finished):
            last = now
            effort.call("write the status", lambda: write(progress), None)
        effort.call("show the progress", lambda: observe(progress), None)

    return show
