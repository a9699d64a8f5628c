"""Stage runner: opens the run directory, measures time, and appends to the history of stages."""

import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime

from fm_core.config import RunConfig
from fm_core.errors import StopRequested, UserError
from fm_core.run.directory import RunDirectory
from fm_core.run.history import preserve_history
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer, Progress
from fm_core.run.results import StageResult
from fm_core.run.status import read_status, write_status
from fm_core.storage.atomic_files import append_line, write_json

STATUS_SECONDS = 1.0

Work = Callable[[RunDirectory, Observer], StageResult]


def run_stage_function(stage: str, config: RunConfig, observe: Observer, work: Work) -> StageResult:
    """Open the run directory, do the work, and append a line to logs/stages.jsonl even if it fails."""
    run = RunDirectory(config)
    run.open()
    preserve_history(run.path)
    began, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    outcome = {"state": "failed", "summary": ""}
    try:
        result = work(run, _with_status(run, observe))
        result = result.model_copy(update={"seconds": round(time.monotonic() - clock, 3)})
        outcome = {"state": result.state, "summary": result.summary}
        _end_status(run, stage, "done")
        return result
    except BaseException as error:
        outcome["summary"] = f"{type(error).__name__}: {error}".splitlines()[0]
        # A BaseException that is no Exception comes from a signal: Ctrl-C, a canceled flow run.
        on_request = isinstance(error, StopRequested) or not isinstance(error, Exception)
        outcome["state"] = "stopped" if on_request else "failed"
        if isinstance(error, Exception) and not isinstance(error, StopRequested | UserError):
            with run.log(stage, "error").open("a") as log:
                traceback.print_exc(file=log)
        _end_status(run, stage, outcome["state"])
        raise
    finally:
        seconds = round(time.monotonic() - clock, 3)
        append_line(run.history, {"stage": stage, "began": began, "seconds": seconds, **outcome})


def _end_status(run: RunDirectory, stage: str, phase: str) -> None:
    """Set the phase in status.json to that of the end, unless a job still runs."""
    status = read_status(run.path)
    if status and status["stage"] == stage and Lease(run.path / "lock").holder() is None:
        status.pop("schema")
        write_json(run.path / "status.json", {**status, "phase": phase})


def _with_status(run: RunDirectory, observe: Observer) -> Observer:
    """The observer, which also writes status.json unless a job runs and writes it itself."""
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        finished = progress.done >= progress.total
        if (now - last > STATUS_SECONDS or finished) and Lease(run.path / "lock").holder() is None:
            last = now
            write_status(run.path, progress)
        observe(progress)

    return show
