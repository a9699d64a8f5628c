"""Copies what a stopped run left waiting (see fm_core.run.afterwards), by the configuration on stdin."""

import os
import sys
import threading
import time
from pathlib import Path

import yaml

from fm_core.config import parse_config
from fm_core.errors import UserError
from fm_core.run.afterwards import Afterwards, keep_record, recorded
from fm_core.run.directory import RunDirectory
from fm_core.training.checkpoints import Checkpoints

LOOK_SECONDS = 0.5
"""How often it looks whether its record is still there."""
PAUSE_SECONDS = 10.0
"""Between two attempts to ask a store what it holds."""


def main() -> None:
    """Copy until everything is in the store, the time is over, or the record is gone."""
    config = parse_config(yaml.safe_load(sys.stdin), "standard input")
    run = RunDirectory(config).path
    ours = recorded(run)
    if ours is None or ours.pid != os.getpid():
        return
    threading.Thread(target=_end_without_record, args=(run,), daemon=True).start()
    waiting = [Checkpoints.of(config)]
    if config.train.snapshot_images:
        waiting.append(Checkpoints.snapshots_of(config))
    problems = [problem for kept in waiting if (problem := _copied(kept, ours))]
    print("; ".join(problems) or f"everything is in {ours.url}", flush=True)
    keep_record(run, ours.model_copy(update={"ended": True, "problem": "; ".join(problems) or None}))


def _copied(kept: Checkpoints, ours: Afterwards) -> str | None:
    """Copy what waits; what was in the way, or None."""
    while True:
        try:
            kept.catch_up()
            return kept.settle(max(ours.until - time.time(), 0))
        except (OSError, UserError) as error:
            if time.time() + PAUSE_SECONDS > ours.until:
                return " ".join(str(error).split())
            print(f"warning: {error}; the upload is tried again in {PAUSE_SECONDS:g} s", flush=True)
            time.sleep(PAUSE_SECONDS)


def _end_without_record(run: Path) -> None:
    while (record := recorded(run)) and record.pid == os.getpid():
        time.sleep(LOOK_SECONDS)
    print("the run goes on, and copies what is left itself", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
