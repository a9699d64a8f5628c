"""Small run on two hosts: its configuration, and its commands in a process of the first host."""

import json
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from fm_core.config import RunConfig, load_config, merge
from fm_core.storage.atomic_files import read_lines
from tests.support import ROOT
from tests.support.two_hosts import Host, environment

SECRET = "a-key-of-an-object-store"
LIMIT_SECONDS = 400.0
"""For everything that is waited for; far longer than any of it takes."""
STEPS = 240
BATCH = 16
SMALL = {
    "run": {"name": "small", "seed": 5},
    "data": {"name": "digits", "validation_images": 60},
    "model": {"channels": 8, "channel_multipliers": [1], "attention_resolutions": [], "head_channels": 8},
    "train": {
        "images": STEPS * BATCH,
        "global_batch": BATCH,
        "learning_rate": 0.01,
        "log_images": 4 * BATCH,
        "checkpoint_images": 16 * BATCH,
        "keep_checkpoints": 2,
    },
    "launch": {"processes": 1, "threads": 1},
    "sample": {"images": 12, "batch": 4, "solver": "euler", "steps": 4},
}


@dataclass
class CommandResult:
    """Result of a command."""

    code: int
    errors: list[str]
    """Lines that start with `fm:`, without progress."""


class TwoHostRun:
    """A configuration file and a process on a host that runs its commands."""

    def __init__(
        self, folder: Path, host: Host, launch: dict, over: dict | None = None, **variables: str
    ) -> None:
        """`over` overrides the configuration, `variables` the environment of the commands."""
        self.folder, self.path = folder, folder / "runs" / "small"
        self.checkpoints = folder / "shared" / "checkpoints"
        places = {
            "run": {"root": str(folder / "runs")},
            "data": {"root": str(folder / "shared" / "data")},
            "train": {"checkpoint_root": str(self.checkpoints)},
            "sample": {"root": str(folder / "shared" / "samples")},
            "launch": launch,
        }
        self.file = folder / "small.yaml"
        self.file.write_text(yaml.safe_dump(merge(merge(SMALL, places), over or {})))
        self.process = subprocess.Popen(
            host.inside(sys.executable, "-m", "tests.support.command_runner"),
            cwd=ROOT,
            env=environment(OBJECT_STORE_KEY=SECRET, **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def config(self) -> RunConfig:
        return load_config(self.file)

    def terminate(self) -> None:
        """Send SIGTERM to the command."""
        psutil.Process(self.process.pid).children()[0].terminate()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def start(self, command: str, *arguments: str) -> None:
        """Start a command."""
        self.process.stdin.write(json.dumps([command, "--config", str(self.file), *arguments]) + "\n")
        self.process.stdin.flush()

    def end(self, seconds: float = LIMIT_SECONDS) -> CommandResult:
        """Wait for the command to end."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        assert ready, f"still running after {seconds} s:\n{self.log()}"
        result = json.loads(self.process.stdout.readline())
        errors = [line for line in result["output"] if line.startswith("fm:")]
        return CommandResult(result["code"], errors)

    def steps(self) -> list[int]:
        """Steps in the metrics file."""
        return [line["step"] for line in read_lines(self.path / "train" / "metrics.jsonl")]

    def wait_beyond(self, step: int, seconds: float = LIMIT_SECONDS) -> int:
        """Wait until a step after `step` is in the metrics; that step."""
        deadline = time.monotonic() + seconds
        while not (beyond := [at for at in self.steps() if at > step]):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        return beyond[-1]

    def log(self) -> str:
        """Log of the hosts."""
        path = self.path / "logs" / "train.log"
        return path.read_text() if path.exists() else "no log"
