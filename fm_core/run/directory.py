"""Run directory: the paths of a run, its identity, and the record of its environment."""

import os
import platform
import shutil
import socket
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig, dump_yaml, merge, parse_config, read_yaml
from fm_core.errors import UserError
from fm_core.storage.atomic_files import write_json, write_text

FREE_BYTES = 256 * 2**20
"""A stage refuses to start with less free disk than this."""

IDENTITY = ("data", "model", "method")
"""Sections that are the identity of a run: they cannot change between two starts."""

_ELASTIC_TRAIN_KEYS = {
    "images",
    "micro_batch",
    "gradient_checkpointing",
    "speed",
    "log_images",
    "checkpoint_images",
    "checkpoint_root",
    "checkpoint_staging",
    "start_over",
    "keep_checkpoints",
    "keep_every_images",
    "skipped_limit",
    "snapshot_images",
    "held_out_images",
    "hang_seconds",
    "zero_stage",
    "init_from",
    "init_attention_order",
    "prometheus",
    "tensorboard",
    "wandb",
}
_ELASTIC_DATA_KEYS = {"root", "cache", "cache_bytes", "workers", "max_quarantined"}


class RunDirectory:
    """The paths of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.run.root) / config.run.name

    @property
    def metrics(self) -> Path:
        """One JSON line for each logging interval."""
        return self.path / "train" / "metrics.jsonl"

    @property
    def train_done(self) -> Path:
        """Written when the last step was trained and its checkpoint verified."""
        return self.path / "train" / "DONE.json"

    @property
    def checkpoints(self) -> str:
        """URL of the checkpoints."""
        return self.config.train.checkpoint_root or str(self.path / "train" / "checkpoints")

    @property
    def samples(self) -> str:
        """URL of the samples of all steps."""
        return self.config.sample.root or str(self.path / "samples")

    @property
    def report(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"

    @property
    def stop(self) -> Path:
        """Creating this file asks the processes of the run to stop."""
        return self.path / "STOP"

    @property
    def history(self) -> Path:
        """One JSON line for each call of a stage."""
        return self.path / "logs" / "stages.jsonl"

    def evaluation(self, step: int, key: str) -> Path:
        """Scores of one set of samples."""
        return self.path / "evaluation" / step_name(step) / f"{key}.json"

    def log(self, stage: str, rank: int | str) -> Path:
        """Everything one process of a stage printed."""
        return self.path / "logs" / f"{stage}-{rank}.log"

    def open(self) -> None:
        """Create the directory, or check that an existing one belongs to the same run.

        config.yaml is written where there is none, and from then on by training alone (`remember`).

        Raises UserError for a directory that cannot be written, a full disk, or a run whose
        data, network, method, seed or optimization differ from this configuration.
        """
        try:
            self._open()
        except OSError as error:
            raise UserError(
                f"run.root: {self.path} cannot be written ({error.strerror}); name a writable directory"
            ) from None

    def remember(self) -> None:
        """Write this configuration to config.yaml.

        Only training does so, when it actually starts; the configuration of another stage is not recorded.
        """
        write_text(self.path / "config.yaml", dump_yaml(self.config))

    def _open(self) -> None:
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < FREE_BYTES:
            raise UserError(
                f"run.root: {free >> 20} MiB free under {self.path}; at least {FREE_BYTES >> 20} are needed"
            )
        descriptor, probe = tempfile.mkstemp(prefix=".writable.", dir=self.path)
        os.close(descriptor)
        Path(probe).unlink()
        recorded = self.path / "config.yaml"
        if recorded.exists():
            changes = differences(identity(_recorded(recorded)), identity(self.config))
            if changes:
                raise UserError(f"{self.path} is another run: {'; '.join(changes)}; choose another run.name")
        else:
            self.remember()
        if not (self.path / "environment.json").exists():
            write_json(self.path / "environment.json", environment())


def step_name(step: int) -> str:
    """Directory name of an optimizer step."""
    return f"step-{step:08d}"


def identity(config: RunConfig) -> dict[str, Any]:
    """The values that all starts of one run must have in common."""
    tree = config.model_dump(mode="json")
    elastic = set(_ELASTIC_TRAIN_KEYS)
    if config.train.schedule != "constant":
        # The learning rate depends on train.images: another end is another schedule.
        elastic.remove("images")
    train = {key: value for key, value in tree["train"].items() if key not in elastic}
    data = {key: value for key, value in tree["data"].items() if key not in _ELASTIC_DATA_KEYS}
    data["source"] = {key: value for key, value in data["source"].items() if key != "url"}
    sections = {name: tree[name] for name in IDENTITY}
    return {"run": {"seed": config.run.seed}, **sections, "data": data, "train": train}


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The differences between two nested plain values, key by key, as messages."""
    changes: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key} was {old!r} and is now {new!r}")
    return changes


def environment() -> dict[str, Any]:
    """Host, devices, versions and git commit of this process."""
    names = ("torch", "deepspeed", "torchdiffeq", "webdataset", "fsspec", "numpy", "prefect", "pydantic")
    return {
        "host": socket.gethostname(),
        "devices": _devices(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := _version(name))},
        "git_commit": _git_commit(),
    }


def recorded_config(run: Path) -> RunConfig:
    """The configuration recorded in a run directory, which may have been moved since.

    Raises UserError if it is missing or of an incompatible version.
    """
    place = {"root": str(run.resolve().parent), "name": run.resolve().name}
    config = _recorded(run / "config.yaml")
    return config.model_copy(update={"run": config.run.model_copy(update=place)})


def _recorded(path: Path) -> RunConfig:
    # A recorded file names every key; one written before a key existed gets that key's default.
    tree = merge(RunConfig().model_dump(mode="json"), read_yaml(path))
    return parse_config(tree, where=f"{path} is not of a run that this version can read")


def _devices() -> list[str]:
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return gpus or [f"{os.cpu_count()} CPU cores"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
