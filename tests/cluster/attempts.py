"""Jobs that pretend to work, on the hosts of a file: `python attempts.py FOLDER < attempts.json`.

Prints for each attempt how the supervisor ended.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from fm_core.config import RunConfig
from fm_core.launch.cluster_check import cluster_checks
from fm_core.launch.job import submitted
from fm_core.launch.supervisor import StageJob, supervise


def attempt(
    folder: Path, name: str, does: str, stage: str = "pretend", kill: bool = False, **sections
) -> dict:
    """A job under a supervisor; with `kill` its agent on this host is killed when both ranks work."""
    control = folder / "runs" / name
    (control / "logs").mkdir(parents=True)
    os.environ["PRETEND"] = does
    run = {"root": str(folder / "runs"), "name": name}
    config = RunConfig.model_validate({"run": run, **sections})
    if kill:
        threading.Thread(target=kill_agent, args=(control,)).start()
    began = time.monotonic()
    try:
        made = control / "made-0.json"
        duty = StageJob(control, control / "logs", stage, "pretend_rank:work", config, made.exists)
        supervise(duty, lambda progress: None)
        kind, message = "done", ""
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    return {"kind": kind, "message": message, "seconds": time.monotonic() - began}


def kill_agent(control: Path) -> None:
    while not all((control / f"ready-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    os.kill(submitted(control).pid, signal.SIGKILL)


def look(folder: Path, name: str, **sections) -> dict:
    """The preflight instead of a job."""
    run, data = {"root": str(folder / "runs"), "name": name}, {"root": str(folder / "data")}
    config = RunConfig.model_validate({"run": run, "data": data, **sections})
    return {"checks": [asdict(check) for check in cluster_checks(config)]}


if __name__ == "__main__":
    told = {
        asked["name"]: (attempt if "does" in asked else look)(Path(sys.argv[1]), **asked)
        for asked in json.load(sys.stdin)
    }
    print(json.dumps(told))
