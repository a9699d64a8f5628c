"""The tiny two-rank run that is disturbed: its configuration, its starts, and its processes."""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from infra.chaos_faults.namespaces import ENTER, ProcessHost

ROOT = Path(__file__).resolve().parents[2]
MARK = "CHAOS_EPISODE"
RUN_NAME = "chaos"
KEPT = 2
"""train.keep_checkpoints"""
CONFIGURATION: dict[str, Any] = {
    "data": {"name": "digits", "validation_images": 60, "horizontal_flip": True},
    "model": {
        "channels": 8,
        "channel_multipliers": [1],
        "attention_resolutions": [],
        "head_channels": 8,
        "dropout": 0.1,
        "class_conditional": True,
    },
    "train": {
        "global_batch": 16,
        "learning_rate": 0.01,
        "schedule": "cosine",
        "warmup_images": 32,
        "ema_decays": [0.9],
        "log_images": 32,
        "checkpoint_images": 112,
        "validation_images": 16,
        "keep_checkpoints": KEPT,
    },
    "launch": {"kind": "local", "processes": 2, "threads": 1, "restart_seconds": 0.5},
}
"""Lines and checkpoints are at different steps, so that a line's sums must survive a restart."""


@dataclass
class TrainingStart:
    """One `fm train`."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    host: ProcessHost | None
    began: float = field(default_factory=time.monotonic)
    disturbed: bool = False
    """Whether a fault was injected while it ran."""

    @property
    def last_line(self) -> str:
        """The last line that it printed."""
        lines = re.split(r"[\r\n]+", self.log.read_text(encoding="utf-8", errors="replace").strip())
        return lines[-1] if lines else ""


class TinyTraining:
    """The run of one episode, or the undisturbed reference."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        images: int,
        checkpoint_root: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.path = folder, folder / "runs" / RUN_NAME
        self.mark = uuid.uuid4().hex
        self.starts: list[TrainingStart] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "chaos.yaml"
        tree = {section: dict(values) for section, values in CONFIGURATION.items()}
        tree["run"] = {"name": RUN_NAME, "seed": 5, "root": str(folder / "runs")}
        tree["data"]["root"] = str(data)
        tree["train"]["images"] = images
        if checkpoint_root:
            tree["train"]["checkpoint_root"] = checkpoint_root
        self.file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("FM_", "AWS_"))
        }
        self.variables = {
            **inherited,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "XDG_CACHE_HOME": str(data / "cache"),
            MARK: self.mark,
            **(variables or {}),
        }

    @property
    def metrics(self) -> str:
        """Relative path of the metrics in the run directory."""
        return "train/metrics.jsonl"

    def start(self, stage: str = "train", host: ProcessHost | None = None) -> TrainingStart:
        """Start a stage as an operator does, with the same command each time."""
        number = len(self.starts)
        log = self.folder / f"start-{number:02}.log"
        command = [sys.executable, "-m", "fm_core", stage, "--config", str(self.file)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                host.inside(command) if host else command,
                cwd=self.folder,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        start = TrainingStart(number, process, log, host)
        self.starts.append(start)
        return start

    def alive(self) -> list[TrainingStart]:
        """The starts that have not ended."""
        return [start for start in self.starts if start.process.poll() is None]

    def processes(self) -> list["RunProcess"]:
        """Every live process of the run."""
        matches: list[RunProcess] = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                    continue
                environment = process.environ()
                if environment.get(MARK) == self.mark:
                    role = _role(process.cmdline(), environment)
                    if role:
                        matches.append(RunProcess(process, role))
            except (psutil.Error, OSError):
                continue
        return matches


@dataclass(frozen=True)
class RunProcess:
    """A process of the run and its role."""

    process: psutil.Process
    role: str
    """supervisor, rank group, rank 0, rank 1 or side."""


def _role(command: list[str], environment: Mapping[str, str]) -> str | None:
    line = " ".join(command)
    if ENTER in line:
        return None
    if "fm_core.launch.rank_group" in line:
        return "rank group"
    if "fm_core.launch.worker_main" in line:
        return f"rank {environment.get('RANK')}"
    return "supervisor" if "-m fm_core train" in line else "side"


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that may be missing or in the process of being replaced."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file; none if it is missing."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        return []
