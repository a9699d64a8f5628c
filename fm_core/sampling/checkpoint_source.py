"""Trained models from checkpoints: selection by the keys sample.*, and loading."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import link_or_copy, stored_origin
from fm_core.checkpoint.ownership import foreign_problem
from fm_core.checkpoint.weights_file import locate_weights, read_recipe, verified_sha256, weights_names
from fm_core.config import MethodSection, ModelSection, RunConfig, merge, parse_config, read_yaml
from fm_core.errors import UserError
from fm_core.method.dequantization import Quantizer
from fm_core.method.objectives import Objective
from fm_core.method.registry import require_known_code
from fm_core.models.build import build_method, build_network
from fm_core.models.published_weights import PICKLES
from fm_core.run.directory import RunDirectory, differences, step_name
from fm_core.storage.keyed_random import GeneratorName, generator_of
from fm_core.storage.local_paths import expand_home

EXPORTED = "model.safetensors"
"""File name of the weights in an exported folder."""
CONVERT = (
    "it has no recipe of its network; convert published weights in Python: fm_core.load(FILE, "
    "published='sit').save('weights.safetensors')"
)
PINNED, PINNED_GUIDE = "weights.safetensors", "guide.safetensors"
"""File names, in a job's control directory, of its weights and of its weaker model's weights."""


@dataclass(frozen=True)
class Model:
    """A trained network and what is needed to use it."""

    network: nn.Module
    """In evaluation mode, float32, with gradients disabled for the weights."""
    section: ModelSection
    """The model section from which the network was built."""
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
    """Everything the file records about its training."""
    guide: "Model | None" = None
    """The weaker model of autoguidance."""

    @property
    def coupling(self) -> str:
        """The coupling used in training; independent for files that do not record the method."""
        return str(self.recipe.get("method", {}).get("coupling", "independent"))

    @property
    def generator(self) -> GeneratorName:
        """The random generator used in training, and therefore in sampling and likelihood."""
        return generator_of(self.recipe, "the recipe of the weights")

    @property
    def latent(self) -> bool:
        """Whether the network is of latents, which a decoder would turn into images."""
        return bool(self.recipe.get("latent"))

    @property
    def pairs(self) -> dict[str, Any] | None:
        """The record of the sample set that the model was trained on (reflow); None for images."""
        return self.recipe.get("pairs")

    def trained_on_noise_of(self, seed: int) -> bool:
        """Whether samples of this seed begin at the noise of the model's training pairs."""
        return self.pairs is not None and self.pairs["protocol"].get("seed") == seed

    @property
    def guide_record(self) -> dict[str, Any] | None:
        """Protocol entry of the weaker model, the hash and the step of its weights; None without one."""
        return self.guide and {"weights_sha256": self.guide.weights_sha256, "step": self.guide.step}


def checkpoint_step(config: RunConfig) -> int:
    """The optimizer step selected by sample.step, or the step of a file given as sample.weights.

    Raises UserError if there is no complete checkpoint of this step.
    """
    if config.sample.weights.endswith(".safetensors"):
        return int(read_recipe(Path(config.sample.weights))["step"])
    if config.sample.weights.endswith(PICKLES):
        raise UserError(f"sample.weights: {config.sample.weights}: {CONVERT}")
    steps, url = checkpoint_steps(config), CheckpointCatalog.of(config).store.url
    if config.sample.step == "latest":
        return steps[-1]
    if config.sample.step == "best":
        best = CheckpointCatalog.of(config).best_stored_step()
        if best is None:
            raise UserError(f"sample.step best: no checkpoint in {url} has a validation loss; name a step")
        return best
    if config.sample.step not in steps:
        raise UserError(f"sample.step {config.sample.step}: {url} has {', '.join(map(str, steps))}")
    return config.sample.step


def checkpoint_steps(config: RunConfig) -> list[int]:
    """The optimizer steps that have a complete checkpoint, ascending. Raises UserError if there is none."""
    catalog = CheckpointCatalog.of(config)
    steps = catalog.stored_steps()
    if not steps:
        raise UserError(f"{catalog.store.url} holds no complete checkpoint; run fm train first")
    return steps


def weights_file(config: RunConfig, step: int) -> Path:
    """The weights file selected by sample.weights, downloaded if its checkpoint is in an object store.

    Raises UserError if the checkpoint has no such weights, and none were computed from its run's snapshots.
    """
    weights = config.sample.weights
    if weights.endswith(".safetensors"):
        return Path(weights)
    name = f"ema-{config.train.ema_decays[0]:g}" if weights == "ema" else weights
    store = CheckpointCatalog.of(config).store
    file = locate_weights(store, step, name, RunDirectory(config).path)
    if file is None:
        available = ", ".join(weights_names(store, step)) or "no weights"
        raise UserError(f"sample.weights {weights}: {store.url}/{step_name(step)} has {available}")
    return file


def locate_model(where: str | Path, weights: str, step: int | str) -> tuple[Path, RunConfig | None]:
    """Locate the weights file of a run directory, an exported folder or a file; for a run, also its config.

    `weights` and `step` select a checkpoint of a run. Raises UserError if there are no weights.
    """
    path = expand_home(where)
    if not path.is_dir():
        if path.name.endswith(PICKLES):
            raise UserError(f"{path}: {CONVERT}")
        return path, None
    if (path / EXPORTED).exists():
        return path / EXPORTED, None
    config = config_of_run(path, weights, step)
    return weights_file(config, checkpoint_step(config)), config


def config_of_run(run: Path, weights: str, step: int | str) -> RunConfig:
    """The configuration of a run directory, selecting this checkpoint; UserError if it is not a run."""
    recorded = run / "config.yaml"
    if not recorded.exists():
        raise UserError(f"{run} is neither a run directory (config.yaml) nor an exported folder ({EXPORTED})")
    # The run may have been moved since its configuration was written.
    place = {"root": str(run.resolve().parent), "name": run.resolve().name}
    overrides = {"run": place, "sample": {"weights": weights, "step": step}}
    return parse_config(merge(read_yaml(recorded), overrides), where=str(recorded))


def pin_weights(file: Path, control: Path, name: str = PINNED) -> None:
    """Keep the weights of a job in its control directory, by a hard link if possible.

    Training may remove their checkpoint between the submission of the job and its start. Raises OSError.
    """
    pinned, partial = control / name, control / f".{name}.{os.getpid()}"
    control.mkdir(parents=True, exist_ok=True)
    link_or_copy(file, partial)
    partial.replace(pinned)


def unpin_weights(control: Path) -> None:
    """Remove the files of `pin_weights`."""
    for name in (PINNED, PINNED_GUIDE):
        (control / name).unlink(missing_ok=True)


def job_weights(config: RunConfig, control: Path) -> tuple[int, Path]:
    """Step and file of a job's weights: the pinned file, or a downloaded copy on a host without access."""
    pinned = control / PINNED
    if pinned.exists():
        return int(read_recipe(pinned)["step"]), pinned
    step = checkpoint_step(config)
    return step, weights_file(config, step)


def check_run(config: RunConfig, model: Model, step: int) -> None:
    """Raise UserError for weights that were not trained by the run of this configuration.

    A file given as sample.weights is not checked.
    """
    if config.sample.weights.endswith(".safetensors"):
        return
    catalog = CheckpointCatalog.of(config)
    changes = differences(
        model.section.model_dump(mode="json"), config.model.model_dump(mode="json"), "model."
    )
    if "seed" in model.recipe and model.recipe["seed"] != config.run.seed:
        changes.append(f"run.seed was {model.recipe['seed']!r} and is now {config.run.seed!r}")
    name = model.recipe.get("run", {}).get("name", config.run.name)
    if catalog.shared and name != config.run.name:
        changes.append(f"run.name was {name!r} and is now {config.run.name!r}")
    if changes:
        raise UserError(f"{catalog.store.url} contains another network: {'; '.join(changes)}")
    if problem := foreign_problem(catalog.access, stored_origin(catalog.store, step_name(step))):
        raise UserError(problem)


def load_model(
    path: Path, device: torch.device, config: RunConfig | None = None, trust_code: bool = False
) -> Model:
    """Build the network that a weights file describes, and load the weights.

    Args:
        path: the weights file.
        device: the device of the network.
        config: a run's own configuration; user-defined classes that it names are imported.
        trust_code: also import classes that only the file names.

    Raises:
        UserError: the file was not written by training, differs from the hash in its checkpoint, names code
            that is not trusted, or names a generator of another version.
    """
    digest = verified_sha256(path)
    recipe, weights = read_recipe(path), load_file(path)
    generator_of(recipe, str(path))
    method = MethodSection.model_validate(recipe["method"])
    if not (trust_code or (config is not None and config.sample.trust_code)):
        known = _classes(config.method).values() if config else ()
        require_known_code(_classes(method), [*known], str(path))
    return model_of(recipe, weights, digest, device, str(path))


def model_of(
    recipe: dict[str, Any], weights: Mapping[str, Tensor], digest: str, device: torch.device, where: str
) -> Model:
    """Build the network that a recipe describes, with these weights; `digest` is the hash of their file.

    Raises UserError, which begins with `where`, if the weights do not fit.
    """
    shape = cast(tuple[int, int, int], tuple(recipe["image_shape"]))
    try:
        model = ModelSection.model_validate(recipe["model"])
        objective = build_method(MethodSection.model_validate(recipe["method"])).objective
        network = build_network(model, shape, recipe["classes"], two_times=objective.two_times)
        network.load_state_dict(weights)
    except (ValidationError, RuntimeError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{where} does not hold the network that its recipe describes: {message}") from None
    return Model(
        network=network.to(device).eval().requires_grad_(False),
        section=model,
        objective=objective,
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


def _classes(method: MethodSection) -> dict[str, str]:
    """The names that may be import paths, by kind of component."""
    return {
        "path": method.path,
        "objective": method.objective,
        "coupling": method.coupling,
        "time distribution": method.times,
    }
