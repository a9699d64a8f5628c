"""Run directory: the paths of a run, its identity, and the record of its environment."""

import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from fm_core.config import EARLIER_DEFAULTS, RunConfig, dump_yaml, load_config, merge, parse_config, read_yaml
from fm_core.config.derived_defaults import with_generator
from fm_core.errors import UserError
from fm_core.run.history import preserve_history
from fm_core.run.resource_limits import available_cores
from fm_core.storage.atomic_files import write_json, write_text
from fm_core.storage.local_paths import local_path

FREE_BYTES = 256 * 2**20
"""Minimum free disk space to start a stage."""

IDENTITY = ("data", "model", "method")
"""Sections that form the identity of a run: they cannot change between two starts."""

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
    "validation_images",
    "hang_seconds",
    "zero_stage",
    *("init_from", "init_source", "init_attention_order"),
    "prometheus",
    "tensorboard",
    "wandb",
}
_ELASTIC_DATA_KEYS = {"root", "cache", "cache_bytes", "workers", "max_quarantined", "pairs"}
"""Checkpoints record the version of the data set, and the hash and the split of the pairs."""


class RunDirectory:
    """The paths of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.run.root) / config.run.name
        self.begun = False
        """Whether `begin` was called, i.e. all checks of this start have passed."""

    @property
    def metrics(self) -> Path:
        """One JSON line for each logging interval."""
        return self.path / "train" / "metrics.jsonl"

    @property
    def train_done(self) -> Path:
        """Written after the last step, once its checkpoint is verified."""
        return self.path / "train" / "DONE.json"

    @property
    def checkpoints(self) -> str:
        """URL of the checkpoints."""
        return self.config.train.checkpoint_root or str(self.path / "train" / "checkpoints")

    @property
    def own_checkpoints(self) -> Path | None:
        """The folder of the checkpoints if it is inside the run directory, and so not shared; else None."""
        place = local_path(self.checkpoints)
        named = self.config.train.checkpoint_root is not None
        outside = place is None or not place.resolve().is_relative_to(self.path.resolve())
        return None if named and outside else place

    @property
    def samples(self) -> str:
        """URL of the samples of all steps."""
        return self.config.sample.root or str(self.path / "samples")

    @property
    def report(self) -> Path:
        """The self-contained HTML page."""
        return self.path / "report.html"

    @property
    def stop(self) -> Path:
        """Creating this file asks the processes of the run to stop."""
        return self.path / "STOP"

    @property
    def history(self) -> Path:
        """One JSON line per call of a stage."""
        return self.path / "logs" / "stages.jsonl"

    def evaluation(self, step: int, key: str) -> Path:
        """Scores of one set of samples."""
        return self.path / "evaluation" / step_name(step) / f"{key}.json"

    def log(self, stage: str, rank: int | str) -> Path:
        """Output of one process of a stage."""
        return self.path / "logs" / f"{stage}-{rank}.log"

    def check(self) -> None:
        """Check that this configuration may run here, without leaving files.

        Raises UserError for a directory that cannot be written, a full disk, or a trained run whose
        data, network, method, seed or optimization differ from this configuration.
        """
        with self._writable():
            existing = next(place for place in (self.path, *self.path.parents) if place.exists())
            free = shutil.disk_usage(existing).free
            if free < FREE_BYTES:
                raise UserError(
                    f"run.root: {free >> 20} MiB free under {self.path}; "
                    f"at least {FREE_BYTES >> 20} are needed"
                )
            descriptor, probe = tempfile.mkstemp(prefix=".writable.", dir=existing)
            os.close(descriptor)
            Path(probe).unlink()
        self.check_identity()

    def check_identity(self) -> None:
        """Check that a trained run matches this configuration. Raises UserError."""
        recorded = self.bound_config()
        now = identity(with_generator(self.config, recorded))
        if changes := differences(identity(recorded), now) if recorded else []:
            hint = f"choose another run.name, or continue it with --config {self.path / 'config.yaml'}"
            raise UserError(f"{self.path} is another run: {'; '.join(changes)}; {hint}")

    def begin(self) -> None:
        """Create the directory and record the environment. UserError if it cannot be written.

        A stage calls this after the last check of its configuration, so that a start that fails a check
        leaves no files.
        """
        with self._writable():
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            if not (self.path / "environment.json").exists():
                write_json(self.path / "environment.json", environment())
            preserve_history(self.path, self.own_checkpoints)
        self.begun = True

    def bind(self) -> None:
        """Write this configuration to config.yaml, which binds the run to it.

        Only training does so, after the first applied step of each start. A train.start_over has had its
        effect by then and is not written, so that continuing from config.yaml does not repeat it.

        Raises UserError if the run was bound to another configuration in the meantime.
        """
        self.check_identity()
        if not self._has_results():
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            self.metrics.touch()
        config = with_generator(self.config)
        train = config.train.model_copy(update={"start_over": False})
        write_text(self.path / "config.yaml", dump_yaml(config.model_copy(update={"train": train})))

    def bound_config(self) -> RunConfig | None:
        """The configuration that the run is bound to; None before its first training step.

        Earlier versions also wrote config.yaml for starts that failed a check or only wrote shards, so
        without results of training the file is ignored. UserError if it is of an incompatible version.
        """
        file = self.path / "config.yaml"
        return _recorded(file) if file.exists() and self._has_results() else None

    def _has_results(self) -> bool:
        # The history is written before the first training step.
        trained = self.path / "train"
        begun = trained.exists() and any(file.name != "history.json" for file in trained.iterdir())
        return begun or (self.path / "reproduce").exists()

    @contextmanager
    def _writable(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run.root: {self.path} cannot be written ({error.strerror}); name a writable directory"
            ) from None


def step_name(step: int) -> str:
    """Directory name of an optimizer step."""
    return f"step-{step:08d}"


def identity(config: RunConfig) -> dict[str, Any]:
    """The values that must be equal for all starts of a run."""
    run = with_generator(config).run
    tree = config.model_dump(mode="json")
    # The learning-rate schedule depends on train.images, unless it is constant.
    elastic = _ELASTIC_TRAIN_KEYS - (set() if config.train.schedule == "constant" else {"images"})
    train = {key: value for key, value in tree["train"].items() if key not in elastic}
    data = {key: value for key, value in tree["data"].items() if key not in _ELASTIC_DATA_KEYS}
    data["source"] = {key: value for key, value in data["source"].items() if key != "url"}
    sections = {name: tree[name] for name in IDENTITY}
    return {"run": {"seed": run.seed, "generator": run.generator}, **sections, "data": data, "train": train}


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


def load_run_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a configuration file and apply nested overrides, as `load_config`.

    A config.yaml inside a run directory refers to that directory, even after a move and from any working
    directory, unless the overrides name another run.
    """
    directory = Path(path).resolve().parent
    of_a_run = Path(path).name == "config.yaml" and any(
        (directory / name).exists() for name in ("environment.json", "status.json")
    )
    config = load_config(path, overrides, recorded=of_a_run)
    if not of_a_run:
        return config
    named = {"root", "name"} & ((overrides or {}).get("run") or {}).keys()
    if named or RunDirectory(config).path.resolve() == directory:
        return config
    place = {"run": {"root": str(directory.parent), "name": directory.name}}
    return load_config(path, merge(overrides or {}, place), recorded=True)


def recorded_config(run: Path) -> RunConfig:
    """The configuration recorded in a run directory, which may have been moved.

    Raises UserError if it is missing or of an incompatible version.
    """
    place = {"root": str(run.resolve().parent), "name": run.resolve().name}
    config = _recorded(run / "config.yaml")
    return config.model_copy(update={"run": config.run.model_copy(update=place)})


def _recorded(path: Path) -> RunConfig:
    # Recorded files contain every key of their version; newer keys get their defaults.
    defaults = merge(RunConfig().model_dump(mode="json"), EARLIER_DEFAULTS)
    tree = merge(defaults, read_yaml(path))
    return parse_config(tree, where=f"{path} was written by an incompatible version", recorded=True)


def _devices() -> list[str]:
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        return [f"{os.cpu_count()} CPU cores"]
    import torch  # takes seconds, so only imported if there may be a GPU

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return gpus or [f"{available_cores()} CPU cores"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
