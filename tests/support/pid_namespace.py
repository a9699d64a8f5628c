"""Supervisors of fake jobs in PID namespaces of their own: containers that share the host's name."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from fm_core.launch.job import JOB_VARIABLE, submitted
from tests.support import ROOT

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
NAME = "shared"


class Containers:
    """Several supervisors of one control directory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.control = folder, folder / "runs" / NAME
        self._started: list[subprocess.Popen[str]] = []

    def start(self, heartbeat: float) -> subprocess.Popen[str]:
        """A supervisor whose two ranks wait; it watches a holder elsewhere for three of these intervals."""
        container = subprocess.Popen(
            [*UNSHARE, sys.executable, "-m", "tests.support.fake_job_runner", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "FAKE_HEARTBEAT": str(heartbeat), "PYTHONPATH": str(ROOT)},
        )
        launch = {"processes": 2, "restarts": 0}
        assert container.stdin
        container.stdin.write(json.dumps([{"name": NAME, "does": "wait;wait", "launch": launch}]))
        container.stdin.close()
        container.stdin = None
        self._started.append(container)
        return container

    def wait_for_ranks(self) -> str:
        """Wait until both ranks of the latest job work; return the job's id."""
        deadline = time.monotonic() + 120
        ready = [self.control / f"ready-{rank}" for rank in (0, 1)]
        while not all(path.exists() for path in ready):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        for path in ready:
            path.unlink()
        job = submitted(self.control)
        assert job
        return job.id

    def result(self, container: subprocess.Popen[str]) -> tuple[dict, str]:
        """Exit status and error output of a supervisor."""
        output, errors = container.communicate(timeout=120)
        return json.loads(output)[NAME], errors

    def processes(self, job: str) -> list[psutil.Process]:
        """Every live process of a job, seen from the namespace above."""
        mark, matches = f"{JOB_VARIABLE}={job}".encode(), []
        for process in psutil.process_iter():
            try:
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                    matches.append(process)
            except OSError:
                continue
        return matches

    def supervisor(self, container: subprocess.Popen[str]) -> psutil.Process:
        """The first process of a namespace."""
        (process,) = psutil.Process(container.pid).children()
        return process

    def close(self) -> None:
        """Kill what is left: the end of a namespace's first process ends all others."""
        for container in self._started:
            if container.poll() is None:
                for process in psutil.Process(container.pid).children():
                    process.send_signal(signal.SIGKILL)
                container.kill()
            container.communicate()
