"""A trained model from its file of weights: network, objective, quantiser and where it came from."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from fm_core.config import MethodSection, ModelSection, RunConfig
from fm_core.errors import UserError
from fm_core.method.objectives import Objective
from fm_core.method.quantiser import Quantiser
from fm_core.models.build import build_method, build_network
from fm_core.run.directory import RunDirectory, step_name
from fm_core.run.files import read_json


@dataclass(frozen=True)
class Model:
    """A trained network and what is needed to use it."""

    network: nn.Module
    """In evaluation mode, float32, without gradients for its weights."""
    section: ModelSection
    """What the network was built from."""
    objective: Objective
    quantiser: Quantiser
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


def checkpoint_step(config: RunConfig) -> int:
    """The optimizer step that sample.step means. UserError if there is no complete checkpoint of it."""
    root = Path(RunDirectory(config).checkpoints)
    steps = sorted(int(mark.parent.name.removeprefix("step-")) for mark in root.glob("step-*/COMPLETE"))
    if not steps:
        raise UserError(f"{root} holds no complete checkpoint; run fm train first")
    if config.sample.step == "latest":
        return steps[-1]
    if config.sample.step not in steps:
        raise UserError(f"sample.step {config.sample.step}: {root} has {', '.join(map(str, steps))}")
    return config.sample.step


def weights_file(config: RunConfig, step: int) -> Path:
    """The file of weights that sample.weights means. UserError if the checkpoint has no such weights."""
    directory = Path(RunDirectory(config).checkpoints) / step_name(step)
    weights = config.sample.weights
    name = f"ema-{config.train.ema_decays[0]:g}" if weights == "ema" else weights
    path = directory / f"{name}.safetensors"
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in directory.glob("*.safetensors")))
        raise UserError(f"sample.weights {weights}: {directory} has {there or 'no weights'}")
    return path


def load_model(path: Path, device: torch.device) -> Model:
    """Build the network a file of weights describes and fill it.

    Raises UserError if the file is not one of ours or differs from the hash in its checkpoint.
    """
    digest = _verified_hash(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if "recipe" not in metadata:
        raise UserError(f"{path} does not say what network it belongs to; it was not written by fm train")
    recipe = cast(dict[str, Any], json.loads(metadata["recipe"]))
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
        quantiser=Quantiser(recipe["levels"]),
        image_shape=shape,
        classes=recipe["classes"],
        conditional=model.class_conditional,
        step=recipe["step"],
        images_seen=recipe["images_seen"],
        data_version=recipe["data"]["version"],
        weights_sha256=digest,
    )


def _verified_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file of weights") from None
    complete = read_json(path.parent / "COMPLETE")
    if complete and complete["files"].get(path.name, {}).get("sha256") != digest:
        raise UserError(
            f"{path} differs from the hash in its checkpoint's COMPLETE; sample from another step"
        )
    return digest
