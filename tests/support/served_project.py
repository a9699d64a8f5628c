"""A copy of the working tree whose Prefect server was started by infra/serve.sh, and can be killed."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.support.demo_project import SERVE, Project, copy_of_the_tree, free_port
from tests.support.operator import with_variable

CRASHED_SECONDS = 15
"""After which a crashed run is restarted; 30 in infra/automations.yaml."""
SILENCE_SECONDS = 45
"""After which a run is taken for crashed; 600 in infra/automations.yaml. Heartbeats come every 30 s here, the
shortest interval that Prefect allows; 60 in infra/prefect.yaml."""
RULES = ("silent-runs-crashed", "crashed-runs-resume", "runs-that-crash-again-and-again-fail")

START_SECONDS = 300


class ServedProject(Project):
    """The project and its server process."""

    def start_server(self, **settings: str) -> None:
        """Start the server and wait until it answers. `settings`: of the server alone."""
        (self.root / "runs" / ".prefect").mkdir(parents=True)  # its home
        self._start(SERVE.split(), self.environment() | {"FM_PORT": str(self.port)} | settings)

    def kill_server(self) -> tuple[list[str], dict[str, str]]:
        """kill -9; the command and environment to start it again."""
        process = psutil.Process(self.server.pid)
        command, environment = process.cmdline(), process.environ()
        os.killpg(process.pid, signal.SIGKILL)
        self.server.wait()
        return command, environment

    def restart_server(self, command: list[str], environment: dict[str, str]) -> None:
        """Start a killed server again, with its port and database."""
        self._start(command, environment)

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        with (self.root / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                command,
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.server.poll() is None, (self.root / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return bool(self.api("/health"))
        except OSError:
            return False


@contextmanager
def served_project(folder: Path, variables: dict[str, str], **settings: str) -> Iterator[ServedProject]:
    """A project and its server. `variables`: of the entire environment; `settings`: of the server alone."""
    project = ServedProject(copy_of_the_tree(folder), free_port(), variables)
    try:
        project.start_server(**settings)
        yield project
    finally:
        project.close()
        if project.server.poll() is None:
            os.killpg(project.server.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                project.server.wait(60)
        for process in with_variable("PYTHONPATH", str(project.root)):  # workers, runs and jobs
            with suppress(psutil.Error):
                process.kill()


def listen_for(served: ServedProject, seconds: int) -> None:
    """Let the server mark a run as crashed that sends no heartbeat for this long."""
    rules = (served.root / "infra" / "automations.yaml").read_text()
    assert rules.count("within: 600") == rules.count("within: 30\n") == 1
    rules = rules.replace("within: 600", f"within: {seconds}").replace(
        "within: 30\n", f"within: {CRASHED_SECONDS}\n"
    )
    (served.root / "rules.yaml").write_text(rules)
    updated = served.command("python", "-m", "flows.automations", "rules.yaml").stdout.splitlines()
    assert updated == [f"{rule}: updated" for rule in RULES]
