"""A copy of the working tree with a Prefect server, and the one that infra/demo.sh leaves."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.command_server import CommandServer

SERVE = "bash infra/serve.sh"
WORKER = "prefect worker start --pool local --type process"
"""Two commands of the operator's page that run until they are stopped."""

SMALL_NETWORK = {"channels": 8, "channel_multipliers": [1], "head_channels": 8}
SHRUNKEN = {
    "model": SMALL_NETWORK,
    "train": {"images": 1280, "log_images": 640, "checkpoint_images": 640, "warmup_images": 0},
    "sample": {"images": 200, "solver": "euler", "steps": 10},
    "evaluate": {"likelihood": {"images": 0}},
}
"""What a test asks of infra/configs/digits.yaml: every stage, ten steps of training."""


def copy_of_the_tree(target: Path) -> Path:
    """Copy what a fresh clone with the uncommitted changes would contain."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def clean_environment() -> dict[str, str]:
    """The caller's environment without Prefect settings; the demo uses the tests' virtual environment."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "FM_"))}
    # The numbers that tests expect (two processes, their sizes) are those of a machine without a GPU.
    return inherited | {"FM_ENVIRONMENT": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}


def demo_command(root: Path, *options: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "infra/demo.sh", *options],
        cwd=root,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Project:
    """A copy of the tree, its Prefect server, and a terminal of its operator."""

    root: Path
    port: int
    variables: dict[str, str] = field(default_factory=dict)
    """Of the operator's environment, beyond the server's address."""
    documented: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)

    @property
    def password(self) -> str:
        """user:password of the server: the operator's, or the one that infra/serve.sh has generated."""
        password_file = self.root / "runs" / ".prefect" / f"api-auth-{self.port}"
        return self.variables.get("PREFECT_API_AUTH_STRING") or password_file.read_text().strip()

    @property
    def secret(self) -> str:
        """The password as it is sent, and as the UI keeps it."""
        return b64encode(self.password.encode()).decode()

    def environment(self) -> dict[str, str]:
        """Environment of a terminal of the operator."""
        return clean_environment() | {
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
            "PREFECT_HOME": str(self.root / "runs" / ".prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PYTHONPATH": str(self.root),
            "COLUMNS": "300",
            **self.variables,
        }

    @cached_property
    def commands(self) -> CommandServer:
        return CommandServer(self.root, self.environment())

    def close(self) -> None:
        if "commands" in self.__dict__:
            self.commands.close()

    def command(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in the project's root; with settings, in a new process."""
        if not settings:
            return self.commands.run(*arguments)
        return subprocess.run(
            [str(Path(sys.prefix) / "bin" / arguments[0]), *arguments[1:]],
            cwd=self.root,
            env=self.environment() | settings,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def shell(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the system in the project's root."""
        return subprocess.run(
            arguments, cwd=self.root, env=clean_environment(), capture_output=True, text=True, timeout=600
        )

    def prefect(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run Prefect's own command in the project's root."""
        return self.command("prefect", *arguments, **settings)

    def page_command(self, command: str) -> str:
        """The output of a command of a page, which has to succeed; a command on several pages runs once."""
        if command not in self.documented:
            arguments = shlex.split(command)
            prepared = arguments[0] in ("prefect", "python", "fm")
            self.documented[command] = (self.command if prepared else self.shell)(*arguments)
        done = self.documented[command]
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def api(self, path: str, query: dict[str, Any] | None = None, patience: int = 5) -> Any:
        """GET, or POST a query; again, as Prefect's own client does, where SQLite lets nobody write now."""
        headers = {"content-type": "application/json", "authorization": f"Basic {self.secret}"}
        body = None if query is None else json.dumps(query).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api{path}", body, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            return json.load(opener.open(request, timeout=60))
        except urllib.error.HTTPError as error:
            if error.code != 503 or not patience:
                raise
        time.sleep(2)
        return self.api(path, query, patience - 1)

    def run(self, run_id: str) -> dict[str, Any]:
        """A flow run's record."""
        return self.api(f"/flow_runs/{run_id}")

    def artifacts(self, run_id: str) -> dict[str, dict[str, Any]]:
        """The artifacts of a flow run, by key."""
        records = self.api("/artifacts/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        return {artifact["key"]: artifact for artifact in records}

    def log_messages(self, run_id: str) -> list[str]:
        lines = self.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}})
        return [line["message"] for line in lines]

    def watched(self, deployment: str, *options: str) -> dict[str, Any]:
        """Run a deployment to its end; the flow run's record on the server."""
        result = self.prefect("deployment", "run", deployment, "--watch", *options)
        return self.run(created_run(result))


@dataclass
class Demo(Project):
    """A finished demo, and the server and worker it left running."""

    result: subprocess.CompletedProcess[str] = field(kw_only=True)

    @property
    def run_id(self) -> str:
        """The flow run that the demo watched."""
        return created_run(self.result)


def created_run(result: subprocess.CompletedProcess[str]) -> str:
    """The id of the flow run that `prefect deployment run` has created."""
    assert "UUID: " in result.stdout, result.stdout + result.stderr
    return result.stdout.split("UUID: ")[1].split()[0]
