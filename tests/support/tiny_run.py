"""Tiny run on digits: its configuration and its commands."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fm_core.config import RunConfig, load_config, merge
from tests.support import ROOT

STAGES = ("shard", "train", "sample", "evaluate", "report")

TINY = {
    "run": {"name": "tiny", "seed": 5},
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
        "images": 320,
        "global_batch": 16,
        "learning_rate": 0.01,
        "schedule": "cosine",
        "warmup_images": 32,
        "ema_decays": [0.9, 0.5],
        "log_images": 48,
        "checkpoint_images": 64,
        "keep_checkpoints": 2,
    },
    "launch": {"processes": 2, "threads": 1},
    "sample": {"images": 20, "batch": 8, "solver": "euler", "steps": 4},
    "evaluate": {"likelihood": {"images": 2, "batch": 1, "rtol": 0.1, "atol": 0.1}},
    "report": {"neighbours": 4},
}


@dataclass
class CommandOutput:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@dataclass
class TinyRun:
    """A configuration file and the commands on it."""

    root: Path
    name: str = "tiny"
    over: dict = field(default_factory=dict)
    first: dict[str, CommandOutput] = field(default_factory=dict)

    def __post_init__(self) -> None:
        places = {
            "run": {"root": str(self.root / "runs"), "name": self.name},
            "data": {"root": str(self.root / "data")},
        }
        self.file = self.root / f"{self.name}.yaml"
        self.file.write_text(yaml.safe_dump(merge(merge(TINY, places), self.over)))
        self.path = self.root / "runs" / self.name

    @property
    def config(self) -> RunConfig:
        return load_config(self.file)

    def copy(self, name: str) -> "TinyRun":
        """A copy of the run under another name, for tests that add to it; the data set is shared."""
        other = TinyRun(self.root, name)
        shutil.copytree(self.path, other.path, ignore=shutil.ignore_patterns("lock", "job.json"))
        return other

    def fm(self, command: str, *words: str, **variables: str) -> CommandOutput:
        """The command in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "fm_core", command, "--config", str(self.file), *words],
            cwd=self.root,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        return CommandOutput(done.returncode, done.stdout, done.stderr)


def is_progress(line: str) -> bool:
    """Whether a line of stderr reports a stage's progress, not its end."""
    return bool(re.match(rf"({'|'.join(STAGES)}): [\d,]+/[\d,]+ ", line))
