"""Tiny run on digits: its configuration and its commands."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import yaml

from fm_core import cli
from fm_core.config import RunConfig, load_config, merge
from tests.support import ROOT
from tests.support.fault_injection import FaultyPath
from tests.support.short_classifier import short_classifier

STAGES = ("shard", "train", "sample", "evaluate", "report")
DEBUG = ("--launch.kind", "debug", "--launch.processes", "1")
"""Arguments that run the rank of a stage in the calling process."""
VARIABLES = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

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

NOT_COPIED = shutil.ignore_patterns("lock", "job.json")


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
        self.name = self._unused_name()
        places = {
            "run": {"root": str(self.root / "runs"), "name": self.name},
            "data": {"root": str(self.root / "data")},
        }
        self.file = self.root / f"{self.name}.yaml"
        self.file.write_text(yaml.safe_dump(merge(merge(TINY, places), self.over)))
        self.path = self.root / "runs" / self.name

    def _unused_name(self) -> str:
        """The name, numbered if another run of this root has it: tests of several files share a root."""
        numbered = [self.name, *(f"{self.name}-{number}" for number in range(2, 100))]
        return next(name for name in numbered if not (self.root / f"{name}.yaml").exists())

    @property
    def config(self) -> RunConfig:
        return load_config(self.file)

    def copy(self, name: str) -> "TinyRun":
        """A copy of the run under another name, for tests that add to it; the data set is shared."""
        other = TinyRun(self.root, name)  # its name may be numbered
        shutil.copytree(self.path, other.path, ignore=NOT_COPIED)
        return other

    @classmethod
    def complete(cls, root: Path) -> "TinyRun":
        """A run after all stages: its training has two ranks under the local launcher."""
        run = cls(root)
        for stage in STAGES:
            with short_classifier():
                run.first[stage] = run.fm(stage, *(DEBUG if stage == "sample" else ()))
            assert run.first[stage].code == 0, run.first[stage].err
        outputs = {stage: asdict(output) for stage, output in run.first.items()}
        (root / "outputs.json").write_text(json.dumps(outputs))
        return run

    @classmethod
    def copied(cls, source: Path, root: Path) -> "TinyRun":
        """A copy of a complete run, of its data set and of its outputs, in another root directory."""
        run = cls(root)
        shutil.copytree(source / "runs", root / "runs", ignore=NOT_COPIED)
        shutil.copytree(source / "data", root / "data")
        outputs = (source / "outputs.json").read_text().replace(str(source), str(root))
        run.first = {stage: CommandOutput(**output) for stage, output in json.loads(outputs).items()}
        # The report names the place of the run.
        assert run.fm("report").code == 0
        return run

    def fm(self, command: str, *arguments: str, **variables: str) -> CommandOutput:
        """The command in this process."""
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        FaultyPath.drawn = 0  # a debugged rank counts in this process
        try:
            with pytest.MonkeyPatch.context() as patch, chdir(self.root):
                for name, value in {**VARIABLES, **variables}.items():
                    patch.setenv(name, value)
                with redirect_stdout(out), redirect_stderr(err):
                    code = cli.main([command, "--config", str(self.file), *arguments])
        except SystemExit as wrong_arguments:
            code = wrong_arguments.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return CommandOutput(code, out.getvalue(), err.getvalue())

    def start(self, command: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """The command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "fm_core", command, "--config", str(self.file), *arguments],
            cwd=self.root,
            env={**os.environ, **VARIABLES, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )


def is_progress(line: str) -> bool:
    """Whether a line of stderr reports a stage's progress, not its end."""
    return bool(re.match(rf"({'|'.join(STAGES)}): [\d,]+/[\d,]+ ", line))
