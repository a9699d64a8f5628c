"""A trained model from its file of weights: network, objective, quantizer and where it came from."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from fm_core.config import MethodSection, ModelSection, RunConfig
from fm_core.errors import UserError
from fm_core.method.dequantization import Quantizer
from fm_core.method.objectives import Objective
from fm_core.models.build import build_method, build_network
from fm_core.run.directory import RunDirectory, step_name
from fm_core.storage.atomic_files import read_json
from fm_core.storage.store import Store

COMPLETE = "COMPLETE"
"""What a checkpoint carries that counts: its files' sizes and hashes."""
COPIED_SECONDS = 600.0
"""So long another process may take to load what it fetched."""


@dataclass(frozen=True)
class Model:
    """A trained network and what is needed to use it."""

    network: nn.Module
    """In evaluation mode, float32, without gradients for its weights."""
    section: ModelSection
    """What the network was built from."""
    objective: Objective
    quantizer: Quantizer
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    """Number of classes of the data set; 0 without labels."""
    conditional: bool
    """Whether the network takes labels."""
    step: int
    images_seen: int
    data_version: str
    weights_sha256: str
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    """All that the file says of itself."""


def checkpoint_step(config: RunConfig) -> int:
    """The optimizer step that sample.step means, or that of the file that sample.weights names.

    UserError if there is no complete checkpoint of it.
    """
    if config.sample.weights.endswith(".safetensors"):
        return int(_recipe(Path(config.sample.weights))["step"])
    root, steps = Store.at(RunDirectory(config).checkpoints), checkpoint_steps(config)
    if config.sample.step == "latest":
        return steps[-1]
    if config.sample.step == "best":
        return _best(root, steps)
    if config.sample.step not in steps:
        raise UserError(f"sample.step {config.sample.step}: {root.url} has {', '.join(map(str, steps))}")
    return config.sample.step


def checkpoint_steps(config: RunConfig) -> list[int]:
    """The optimizer steps that have a complete checkpoint, ascending; UserError if there is none."""
    root = Store.at(RunDirectory(config).checkpoints)
    names = [name for name in root.folders() if name.startswith("step-")]
    steps = sorted(
        int(name.removeprefix("step-")) for name in names if root.size(f"{name}/{COMPLETE}") is not None
    )
    if not steps:
        raise UserError(f"{root.url} holds no complete checkpoint; run fm train first")
    return steps


def weights_file(config: RunConfig, step: int) -> Path:
    """The file of weights that sample.weights means, fetched if its checkpoint is in an object store.

    UserError if the checkpoint has no such weights, and none were made of its run's snapshots.
    """
    run, weights = RunDirectory(config), config.sample.weights
    if weights.endswith(".safetensors"):
        return Path(weights)
    name = f"ema-{config.train.ema_decays[0]:g}" if weights == "ema" else weights
    file = f"{name}.safetensors"
    made = run.path / "train" / "averages" / step_name(step) / file
    if made.exists():
        return made
    checkpoint = Store.at(run.checkpoints, step_name(step))
    if checkpoint.size(file) is None:
        there = ", ".join(
            sorted(one.removesuffix(".safetensors") for one in checkpoint.sizes() if "saf" in one)
        )
        raise UserError(f"sample.weights {weights}: {checkpoint.url} has {there or 'no weights'}")
    if checkpoint.local:
        return checkpoint.local / file
    return _fetched(checkpoint, file, run.path / "train" / "fetched" / step_name(step))


def _fetched(checkpoint: Store, file: str, folder: Path) -> Path:
    """A local copy of a file of a checkpoint, with the COMPLETE that holds its hash beside it.

    A step's name alone says nothing: it may have been trained again. COMPLETE is read every time, and the
    file where it is another. Copies of other steps are removed.
    """
    _remove_old_copies(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(checkpoint, COMPLETE, folder)
        facts = (read_json(folder / COMPLETE) or {})["files"].get(file, {})
        if not (folder / file).exists() or _sha256(folder / file) != facts.get("sha256"):
            _fetch(checkpoint, file, folder)
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint.url} was removed meanwhile ({error}); run it again") from None
    os.utime(folder)
    return folder / file


def _fetch(checkpoint: Store, name: str, folder: Path) -> None:
    partial = folder / f".{name}.{os.getpid()}.partial"
    checkpoint.fetch(name, partial)
    partial.replace(folder / name)


def _remove_old_copies(folder: Path) -> None:
    for other in folder.parent.glob("step-*"):
        with suppress(OSError):
            if other != folder and time.time() - other.stat().st_mtime > COPIED_SECONDS:
                shutil.rmtree(other)


def _best(root: Store, steps: Sequence[int]) -> int:
    """The step of the lowest held-out loss that a checkpoint's state.json tells; the later of two equal."""
    losses = {step: loss for step in steps if (loss := _held_out_loss(root, step)) is not None}
    if not losses:
        raise UserError(f"sample.step best: no checkpoint in {root.url} tells a held-out loss; name a step")
    return min(losses, key=lambda step: (losses[step], -step))


def _held_out_loss(root: Store, step: int) -> float | None:
    try:
        return json.loads(root.read_bytes(f"{step_name(step)}/state.json")).get("held_out_loss")
    except (FileNotFoundError, ValueError):
        return None


def load_model(path: Path, device: torch.device) -> Model:
    """Build the network a file of weights describes and fill it.

    Raises UserError if the file is not one of ours or differs from the hash in its checkpoint.
    """
    digest = _verified_hash(path)
    recipe, weights = _recipe(path), load_file(path)
    shape = cast(tuple[int, int, int], tuple(recipe["image_shape"]))
    try:
        model = ModelSection.model_validate(recipe["model"])
        network = build_network(model, shape, recipe["classes"])
        network.load_state_dict(weights)
    except (ValidationError, RuntimeError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not hold the network that it says it holds: {first}") from None
    return Model(
        network=network.to(device).eval().requires_grad_(False),
        section=model,
        objective=build_method(MethodSection.model_validate(recipe["method"])).objective,
        quantizer=Quantizer(recipe["levels"]),
        image_shape=shape,
        classes=recipe["classes"],
        conditional=model.class_conditional,
        step=recipe["step"],
        images_seen=recipe["images_seen"],
        data_version=recipe["data"]["version"],
        weights_sha256=digest,
        recipe=recipe,
    )


def _recipe(path: Path) -> dict[str, Any]:
    """What a file of weights says of itself. UserError if it cannot be read or says nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if "recipe" not in metadata:
        raise UserError(f"{path} does not say what network it belongs to; it was not written by fm train")
    return cast(dict[str, Any], json.loads(metadata["recipe"]))


def _verified_hash(path: Path) -> str:
    try:
        digest = _sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file of weights") from None
    complete = read_json(path.parent / COMPLETE)
    if complete and complete["files"].get(path.name, {}).get("sha256") != digest:
        raise UserError(
            f"{path} differs from the hash in its checkpoint's COMPLETE; sample from another step"
        )
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
