"""An average of any width after training, from the snapshots that training kept."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import read_state, tensors_file
from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory, step_name
from fm_core.training.lr_schedule import POWER, ema_decays, power_name
from fm_core.training.power import Profile, combination, mismatch, power_exponent


def average_file(config: RunConfig, width: float, step: int) -> Path:
    """Where an average that is made afterwards lies; in the run directory, as checkpoints are sealed."""
    averages = RunDirectory(config).path / "train" / "averages"
    return averages / step_name(step) / tensors_file(power_name(width))


def make_average(config: RunConfig, step: int) -> None:
    """Make what sample.weights asks for, if that is a power-function average that training did not keep.

    UserError if there is no snapshot of that step to make it of.
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
    """Make the power-function average of any relative width, as it would have been at a snapshot's step.

    It is the combination of all snapshots up to that step (by default the newest) whose profile is nearest
    to the wanted one. The file's metadata holds the recipe of its weights and, under "average", the relative
    distance between the two profiles.

    Raises:
        UserError: there is no such snapshot, one is damaged, or the width is none.
    """
    snapshots = CheckpointCatalog.snapshots_of(config)
    steps = snapshots.steps()
    last = step if step is not None else max(steps, default=0)
    if last not in steps:
        there = ", ".join(map(str, steps)) or "none; set train.ema_power_widths and train.snapshot_images"
        raise UserError(f"{snapshots.store.url}: no snapshot of step {last}; there are: {there}")
    kept: list[tuple[Path, Profile]] = []
    for one in (one for one in steps if one <= last):
        folder = snapshots.folder_of(one)
        applied = read_state(folder).applied_steps
        for kept_width in config.train.ema_power_widths:
            profile = Profile(applied, power_exponent(kept_width))
            kept.append((folder / tensors_file(power_name(kept_width)), profile))
    try:
        wanted = Profile(kept[-1][1].steps, power_exponent(width))
    except ValueError as error:
        raise UserError(f"{power_name(width)}: {error}") from None
    profiles = [profile for _, profile in kept]
    coefficients = combination(profiles, wanted)
    tensors, metadata = _combined([path for path, _ in kept], coefficients.tolist())
    distance = mismatch(profiles, coefficients, wanted)
    recipe = {**json.loads(metadata["recipe"]), "average": {"width": width, "mismatch": distance}}
    target = average_file(config, width, last)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    save_file(tensors, partial, {"recipe": json.dumps(recipe)})
    partial.replace(target)
    return target


def _combined(files: list[Path], coefficients: list[float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The sum of the files' tensors times their coefficients, and the newest one's metadata."""
    sums: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for path, coefficient in zip(files, coefficients, strict=True):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118
                # The coefficients are larger than their sum and of both signs.
                part = file.get_tensor(name).double() * coefficient
                sums[name] = sums[name].add_(part) if name in sums else part
    return {name: tensor.float() for name, tensor in sums.items()}, metadata
