"""Supervisor runs of fake jobs, given as JSON: `python -m tests.support.fake_job_runner FOLDER < jobs.json`.

Prints as JSON how the supervisor of each job ended. FAKE_HEARTBEAT is the interval of heartbeats in seconds.
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
from fm_core.run import lease


def run_job(
    folder: Path, name: str, does: str, stage: str = "pretend", kill: bool = False, **sections
) -> dict:
    """Supervise a job; with `kill`, kill its agent on this host once both ranks work."""
    control = folder / "runs" / name
    (control / "logs").mkdir(parents=True, exist_ok=True)
    os.environ["FAKE_RANKS"] = does
    run = {"root": str(folder / "runs"), "name": name}
    config = RunConfig.model_validate({"run": run, **sections})
    if kill:
        threading.Thread(target=kill_agent, args=(control,)).start()
    try:
        made = control / "made-0.json"
        worker = "tests.support.fake_rank:work"
        stage_job = StageJob(control, control / "logs", stage, worker, config, made.exists)
        supervise(stage_job, lambda progress: print(progress.message, file=sys.stderr, flush=True))
        kind, message = "done", ""
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    return {"kind": kind, "message": message}


def kill_agent(control: Path) -> None:
    while not all((control / f"ready-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    os.kill(submitted(control).pid, signal.SIGKILL)


def check_cluster(folder: Path, name: str, **sections) -> dict:
    """Run the cluster check instead of a job."""
    run, data = {"root": str(folder / "runs"), "name": name}, {"root": str(folder / "data")}
    config = RunConfig.model_validate({"run": run, "data": data, **sections})
    return {"checks": [asdict(check) for check in cluster_checks(config)]}


if __name__ == "__main__":
    lease.HEARTBEAT_SECONDS = float(os.environ.get("FAKE_HEARTBEAT", lease.HEARTBEAT_SECONDS))
    results = {
        request["name"]: (run_job if "does" in request else check_cluster)(Path(sys.argv[1]), **request)
        for request in json.load(sys.stdin)
    }
    print(json.dumps(results))
