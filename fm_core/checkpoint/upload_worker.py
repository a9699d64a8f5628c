"""Worker that uploads the checkpoints a stopped run left behind; reads the configuration from stdin.

See fm_core.launch.upload_handover.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import yaml

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.config import parse_config
from fm_core.errors import UserError
from fm_core.launch.upload_handover import (
    UploadRecord,
    read_upload_record,
    touch_upload_record,
    write_upload_record,
)
from fm_core.run.directory import RunDirectory, step_name

LOOK_SECONDS = 0.5
"""How often it looks whether its record is still there."""
PAUSE_SECONDS = 10.0
"""Between two attempts to ask a store what it holds."""
MARGIN_SECONDS = 5.0
"""A store that does not even answer is left so long after the time is over."""


def main() -> None:
    """Copy until everything is in the store, the time is over, or the record is gone."""
    config = parse_config(yaml.safe_load(sys.stdin), "standard input")
    run = RunDirectory(config).path
    ours = read_upload_record(run)
    if ours is None or ours.pid != os.getpid():
        return
    threading.Thread(target=_look_on, args=(run, ours), daemon=True).start()
    checkpoints = CheckpointCatalog.of(config)
    waiting = [
        checkpoints,
        *([CheckpointCatalog.snapshots_of(config)] if config.train.snapshot_images else []),
    ]
    problems = [problem for kept in waiting if (problem := _copied(kept, ours, of_run=kept is checkpoints))]
    _end(run, ours, "; ".join(problems) or None)


def _copied(kept: CheckpointCatalog, ours: UploadRecord, of_run: bool) -> str | None:
    """Copy what waits; what was in the way, or is wrong with the run's last checkpoint there, or None."""
    while True:
        try:
            kept.catch_up(newest=ours.step)
            problem = kept.wait(max(ours.until - time.time(), 0))
            return problem or (kept.problem_of(step_name(ours.step)) if of_run else None)
        except (OSError, UserError) as error:
            if time.time() + PAUSE_SECONDS > ours.until:
                return " ".join(str(error).split())
            _say(f"warning: {error}; the upload is tried again in {PAUSE_SECONDS:g} s")
            time.sleep(PAUSE_SECONDS)


def _look_on(run: Path, ours: UploadRecord) -> None:
    """End the process when its record is gone or, whatever it waits for, when its time is over."""
    while touch_upload_record(run):
        if time.time() > ours.until + MARGIN_SECONDS:
            _end(run, ours, f"{ours.url} did not answer in time")
        time.sleep(LOOK_SECONDS)
    _say("the run goes on, and copies what is left itself")
    os._exit(0)


def _end(run: Path, ours: UploadRecord, problem: str | None) -> None:
    """Write down how it ended, unless a new start has taken the record, and end; no thread keeps it."""
    with suppress(OSError):
        if touch_upload_record(run):
            write_upload_record(run, ours.model_copy(update={"ended": True, "problem": problem}))
    _say(problem or f"everything is in {ours.url}")
    os._exit(0)


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk
        print(text, flush=True)


if __name__ == "__main__":
    main()
