"""Post-hoc EMA (EDM2, section 3): an average of any width, computed after training from snapshots."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import read_state, tensors_file
from fm_core.checkpoint.weights_file import posthoc_file
from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory
from fm_core.training.ema import (
    POWER,
    Profile,
    combination,
    ema_decays,
    mismatch,
    power_exponent,
    power_name,
)

MAX_MISMATCH = 0.1
"""Largest relative distance of the combined profile from the target."""


def average_file(config: RunConfig, width: float, step: int) -> Path:
    """Path of the power-function average of a width at a snapshot's step."""
    return posthoc_file(RunDirectory(config).path, step, power_name(width))


def make_average(config: RunConfig, step: int) -> None:
    """Compute the average named by sample.weights, if it is a power-function one that training did not store.

    Raises UserError if there is no snapshot of that step.
    """
    name = config.sample.weights
    if not name.startswith(POWER) or name in ema_decays(config.train):
        return
    try:
        width = float(name.removeprefix(POWER))
    except ValueError:
        raise UserError(f"sample.weights {name}: a width was expected, e.g. {power_name(0.1)}") from None
    if not average_file(config, width, step).exists():
        reconstruct(config, width, step)


def reconstruct(config: RunConfig, width: float, step: int | None = None) -> Path:
    """Compute the power-function average of any relative width at a snapshot's step.

    It is the combination of all snapshots up to that step (by default the newest) whose profile is nearest to
    the target profile. The file's metadata contains the recipe of its weights and, under "average", the
    relative distance between the two profiles.

    Raises:
        UserError: there is no such snapshot, one is damaged, no profile has this width, or the snapshots do
            not span it.
    """
    snapshots = CheckpointCatalog.of(config).snapshots()
    steps = snapshots.steps()
    last = step if step is not None else max(steps, default=0)
    if last not in steps:
        available = ", ".join(map(str, steps)) or "none; set train.ema_power_widths and train.snapshot_images"
        raise UserError(f"{snapshots.store.url}: no snapshot of step {last}; there are: {available}")
    stored = _stored_averages(config, snapshots, [number for number in steps if number <= last])
    try:
        target = Profile(stored[-1][1].steps, power_exponent(width))
    except ValueError as error:
        raise UserError(f"{power_name(width)}: {error}") from None
    profiles = [profile for _, profile in stored]
    coefficients = combination(profiles, target)
    distance = mismatch(profiles, coefficients, target)
    if distance > MAX_MISMATCH:
        widths = ", ".join(f"{stored_width:g}" for stored_width in config.train.ema_power_widths)
        raise UserError(
            f"{power_name(width)}: the snapshots of widths {widths} up to step {last} do not span it "
            f"(mismatch {distance:.2g}, at most {MAX_MISMATCH:g}); choose a width nearer to these, or train "
            "with more snapshots (train.snapshot_images)"
        )
    tensors, metadata = _combine([path for path, _ in stored], coefficients.tolist())
    recipe = {**json.loads(metadata["recipe"]), "average": {"width": width, "mismatch": distance}}
    file = average_file(config, width, last)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may make the same average at a time.
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    save_file(tensors, partial, {"recipe": json.dumps(recipe)})
    partial.replace(file)
    return file


def _stored_averages(
    config: RunConfig, snapshots: CheckpointCatalog, steps: list[int]
) -> list[tuple[Path, Profile]]:
    """File and profile of every average in the snapshots of these steps."""
    stored: list[tuple[Path, Profile]] = []
    for step in steps:
        folder = snapshots.folder_of(step)
        applied = read_state(folder).applied_steps
        for width in config.train.ema_power_widths:
            profile = Profile(applied, power_exponent(width))
            stored.append((folder / tensors_file(power_name(width)), profile))
    return stored


def _combine(files: list[Path], coefficients: list[float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The sum of the files' tensors times their coefficients, and the newest file's metadata."""
    sums: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for path, coefficient in zip(files, coefficients, strict=True):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118
                # In float64, because the coefficients have both signs and are larger than their sum.
                part = file.get_tensor(name).double() * coefficient
                sums[name] = sums[name].add_(part) if name in sums else part
    return {name: tensor.float() for name, tensor in sums.items()}, metadata
