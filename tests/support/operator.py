"""Operator actions and injected failures on the processes of a project."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from fm_core.launch.job import JOB_VARIABLE
from fm_core.storage.atomic_files import read_json, read_lines
from tests.support.demo_project import Project, created_run

PATIENCE_SECONDS = 300.0
"""How long to wait for what has to happen, on a machine as busy as it may be."""


def until(happened: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait until `happened` returns something true; that value. Exceptions until then are ignored."""
    deadline = time.monotonic() + seconds
    error: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if result := happened():
                return result
        except Exception as caught:
            error = caught
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds:.0f} s: {what} ({error!r})")


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """Every live process with this variable in its environment."""
    matches: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                matches.append(process)
        except psutil.Error:
            continue
    return matches


@dataclass
class Operator:
    """The operator of a project and one run of it, with the workers that this operator started."""

    project: Project
    run: str
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.project.root / "runs" / self.run

    def worker(self, pool: str, **settings: str) -> subprocess.Popen[bytes]:
        """A worker in a session of its own, as systemd would start it."""
        arguments = ("worker", "start", "--pool", pool, "--type", "process")
        with (self.project.root / f"worker-{len(self.workers)}.log").open("wb") as log:
            worker = subprocess.Popen(
                [str(Path(sys.prefix) / "bin" / "prefect"), *arguments],
                cwd=self.project.root,
                env=self.project.environment() | {"PREFECT_WORKER_QUERY_SECONDS": "2"} | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.workers.append(worker)
        return worker

    def start(self, deployment: str, config: str) -> str:
        """Create a flow run; its id."""
        result = self.project.prefect("deployment", "run", deployment, "--param", f"config={config}")
        assert result.returncode == 0, result.stdout + result.stderr
        return created_run(result)

    def state(self, run_id: str) -> dict[str, Any]:
        return self.project.run(run_id)["state"]

    def supervisor(self, run_id: str) -> psutil.Process:
        """The one process of a flow run; of two attempts the older one exits when it sees the other."""

        def alone() -> psutil.Process | None:
            matches = [
                process
                for process in with_variable("PREFECT__FLOW_RUN_ID", run_id)
                if JOB_VARIABLE not in process.environ() and "flows.cancellation" not in process.cmdline()
            ]
            return matches[0] if len(matches) == 1 else None

        return until(alone, "the run has one process")

    def job(self) -> dict[str, Any]:
        record = read_json(self.path / "job.json")
        assert record, f"nothing was ever submitted in {self.path}"
        return record

    def ranks(self) -> list[psutil.Process]:
        """The processes of the job except its launcher."""
        job = self.job()
        return [process for process in with_variable(JOB_VARIABLE, job["id"]) if process.pid != job["pid"]]

    def steps(self) -> list[int]:
        return [line["step"] for line in read_lines(self.path / "train" / "metrics.jsonl")]

    def repeated_steps(self) -> list[int]:
        """Steps in the metrics file that are not greater than the one before; read once, as it grows."""
        steps = self.steps()
        return [step for before, step in pairwise(steps) if step <= before]

    def goes_on(self, lines: int = 2) -> None:
        """Wait for new lines in the metrics file."""
        before = len(self.steps())
        until(lambda: len(self.steps()) >= before + lines, "training goes on")

    def messages(self, run_id: str) -> list[str]:
        """Log messages of a flow run on the server."""
        return self.project.log_messages(run_id)

    def attached(self, run_id: str) -> None:
        """Wait until the run's newest attempt is attached to a job."""

        def says_so() -> bool:
            since = self.state(run_id)["timestamp"]  # when it entered its state, running
            query = {
                "logs": {"flow_run_id": {"any_": [run_id]}, "timestamp": {"after_": since}},
                "limit": 200,
            }
            lines = [line["message"] for line in self.project.api("/logs/filter", query)]
            return any(line.startswith("full logs of its processes") for line in lines)

        until(says_so, "the newest attempt attaches")

    def heard_of(self, run_id: str) -> None:
        """Wait for a heartbeat of the run's newest attempt: silence counts from the first one."""
        resource = f"prefect.flow-run.{run_id}"

        def beats() -> bool:
            since = {"since": self.state(run_id)["timestamp"]}
            names = {"name": ["prefect.flow-run.heartbeat"]}
            query = {"filter": {"event": names, "occurred": since}, "limit": 50}
            events = self.project.api("/events/filter", query)["events"]
            return any(event["resource"]["prefect.resource.id"] == resource for event in events)

        until(beats, "the newest attempt is known")

    def progress(self, run_id: str) -> str:
        """Description of the progress artifact of the run's newest attempt to train."""
        query = {"flow_runs": {"id": {"any_": [run_id]}}, "artifacts": {"key": {"any_": ["train-progress"]}}}
        return max(self.project.api("/artifacts/filter", query), key=lambda bar: bar["updated"])[
            "description"
        ]
