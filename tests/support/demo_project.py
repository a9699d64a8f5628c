"""A copy of the working tree in which infra/demo.sh was run, with its Prefect server and worker."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import ROOT

SERVE = "bash infra/serve.sh"
WORKER = "prefect worker start --pool local --type process"
"""Two commands of the operator's page that do not end by themselves."""

SHRUNKEN = {
    "train": {"images": 5120, "log_images": 640, "checkpoint_images": 2560, "warmup_images": 0},
    "sample": {"images": 200, "solver": "euler", "steps": 10},
    "evaluate": {"likelihood": {"images": 0}},
}


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


def demo_command(root: Path, *options: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "infra/demo.sh", *options],
        cwd=root,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@dataclass
class Demo:
    """A finished demo, and the server and worker it left running."""

    root: Path
    result: subprocess.CompletedProcess[str]
    port: int

    @property
    def run_id(self) -> str:
        """The flow run that the demo watched."""
        return self.result.stdout.split("UUID: ")[1].split()[0]

    @property
    def password(self) -> str:
        """The generated password of the server, "user:password"."""
        return (self.root / "runs" / ".prefect" / f"api-auth-{self.port}").read_text().strip()

    @property
    def secret(self) -> str:
        """The password as it is sent, and as the UI keeps it."""
        return b64encode(self.password.encode()).decode()

    def environment(self) -> dict[str, str]:
        """Environment of a terminal of the demo's operator."""
        return clean_environment() | {
            "PREFECT_HOME": str(self.root / "runs" / ".prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PYTHONPATH": str(self.root),
            "COLUMNS": "300",
        }

    def command(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in the project's root."""
        return subprocess.run(
            [str(Path(sys.prefix) / "bin" / arguments[0]), *arguments[1:]],
            cwd=self.root,
            env=self.environment() | settings,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def prefect(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run Prefect's own command in the project's root."""
        return self.command("prefect", *arguments, **settings)

    def api(self, path: str, query: dict[str, Any] | None = None, patience: int = 5) -> Any:
        """GET, or POST a query; again, as Prefect's own client does, where SQLite lets nobody write now."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api{path}",
            None if query is None else json.dumps(query).encode(),
            {"content-type": "application/json", "authorization": f"Basic {self.secret}"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            return json.load(opener.open(request, timeout=60))
        except urllib.error.HTTPError as error:
            if error.code != 503 or not patience:
                raise
        time.sleep(2)
        return self.api(path, query, patience - 1)

    def run(self, run_id: str | None = None) -> dict[str, Any]:
        return self.api(f"/flow_runs/{run_id or self.run_id}")

    def watched(self, deployment: str, *options: str) -> dict[str, Any]:
        """Run a deployment to its end; the flow run's record on the server."""
        result = self.prefect("deployment", "run", deployment, "--watch", *options)
        assert "UUID: " in result.stdout, result.stdout + result.stderr
        return self.run(result.stdout.split("UUID: ")[1].split()[0])
