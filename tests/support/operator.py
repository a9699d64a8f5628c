"""Operator actions and injected failures on the processes of a demo."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from fm_core.launch.job import JOB_VARIABLE
from fm_core.storage.atomic_files import read_json, read_lines
from tests.support.demo_project import Demo


def until(happened: Callable[[], Any], seconds: float, what: str) -> Any:
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


def moment_of(timestamp: str) -> float:
    """Seconds since 1970 of a server's timestamp."""
    return datetime.fromisoformat(timestamp).timestamp()


@dataclass
class Operator:
    """The operator of a demo and one run of it, with the workers that this operator started."""

    demo: Demo
    run: str
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.demo.root / "runs" / self.run

    def worker(self, pool: str, **settings: str) -> subprocess.Popen[bytes]:
        """A worker in a session of its own, as systemd would start it."""
        arguments = ("worker", "start", "--pool", pool, "--type", "process")
        with (self.demo.root / f"worker-{len(self.workers)}.log").open("wb") as log:
            worker = subprocess.Popen(
                [str(Path(sys.prefix) / "bin" / "prefect"), *arguments],
                cwd=self.demo.root,
                env=self.demo.environment() | {"PREFECT_WORKER_QUERY_SECONDS": "2"} | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.workers.append(worker)
        return worker

    def start(self, deployment: str, config: str) -> str:
        """Create a flow run; its id."""
        result = self.demo.prefect("deployment", "run", deployment, "--param", f"config={config}")
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.split("UUID: ")[1].split()[0]

    def state(self, run_id: str) -> dict[str, Any]:
        return self.demo.run(run_id)["state"]

    def supervisor(self, run_id: str) -> psutil.Process:
        """The one process of a flow run; of two attempts the older one exits when it sees the other."""

        def alone() -> psutil.Process | None:
            matches = [
                process
                for process in with_variable("PREFECT__FLOW_RUN_ID", run_id)
                if JOB_VARIABLE not in process.environ() and "flows.cancellation" not in process.cmdline()
            ]
            return matches[0] if len(matches) == 1 else None

        return until(alone, 30, "the run has one process")

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

    def goes_on(self, seconds: float = 90, lines: int = 2) -> None:
        """Wait for new lines in the metrics file."""
        before = len(self.steps())
        until(lambda: len(self.steps()) >= before + lines, seconds, "training goes on")

    def messages(self, run_id: str) -> list[str]:
        """Log messages of a flow run on the server."""
        return [text for _, text in self.log_lines(run_id)]

    def log_lines(self, run_id: str) -> list[tuple[float, str]]:
        """Log messages with the time of each, in seconds since 1970."""
        query = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        lines = self.demo.api("/logs/filter", query)
        return [(moment_of(line["timestamp"]), line["message"]) for line in lines]

    def lines_of_attempt(self, run_id: str) -> list[tuple[float, str]]:
        """Log lines since the run entered its state: of a running one, those of its newest attempt."""
        since = moment_of(self.state(run_id)["timestamp"])
        return [(moment, text) for moment, text in self.log_lines(run_id) if moment > since]

    def attached(self, run_id: str) -> float:
        """Wait until the run's newest attempt is attached to a job; the time of that."""

        def moment_of_attaching() -> float:
            lines = self.lines_of_attempt(run_id)
            return next(moment for moment, text in lines if text.startswith("full logs of its processes"))

        return until(moment_of_attaching, 90, "the newest attempt attaches")


@dataclass
class PrefectServer:
    """The demo's Prefect server as a process that can be killed and started again."""

    demo: Demo

    @property
    def record(self) -> Path:
        return self.demo.root / "runs" / ".prefect" / "server.pid"

    def kill(self) -> tuple[list[str], dict[str, str]]:
        """kill -9; the command and environment to start it again."""
        process = psutil.Process(int(self.record.read_text()))
        command, environment = process.cmdline(), process.environ()
        os.killpg(process.pid, signal.SIGKILL)
        return command, environment

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        with (self.record.parent / "server.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.demo.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.record.write_text(str(process.pid))
        until(lambda: self.demo.api("/health"), 120, "the server is there again")
