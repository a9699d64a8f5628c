"""Checks of the model that train.init_from names, before a process starts."""

from pathlib import Path

import torch
from pydantic import ValidationError

from fm_core.checkpoint.weights_file import read_recipe
from fm_core.config import MethodSection, ModelSection, RunConfig
from fm_core.config.derived_defaults import absent_keys
from fm_core.errors import UserError
from fm_core.method import paths
from fm_core.method.flow_map import FlowMap
from fm_core.method.objectives import Objective
from fm_core.method.registry import built_in, path_named
from fm_core.run.directory import recorded_config

COEFFICIENT_TOLERANCE = 1e-3
"""Largest difference of alpha_t and sigma_t between paths that count as equal."""
NOT_IN_WEIGHTS = ("size", "dropout")
"""Keys of the model section that change neither the weights nor their function."""


def check_published(config: RunConfig, objective: Objective) -> None:
    """Check that train.init_source predicts a velocity on the path of a flow map. Raises UserError."""
    source = config.train.init_source
    if source is None or not objective.two_times:
        return
    if source != "sit":
        raise UserError(
            f"train.init_source {source}: its network predicts the noise; {objective.name} starts from one "
            "that predicts the velocity, such as one of sit"
        )
    if not same_path(objective.path, paths.OptimalTransport(sigma_min=0.0)):
        raise UserError(
            "train.init_source sit: its path is optimal-transport with sigma_min 0, not "
            f"{config.method.path} with {config.method.path_options}"
        )


def check_teacher(config: RunConfig, objective: Objective) -> None:
    """Check that the weights of train.init_from fit the network and, where they must, the method.

    A flow map starts from a network that predicts the velocity, and a student of pairs from one with its own
    prediction; both need the same path. A run directory and a file of this program are checked; another file
    has no record. Raises UserError.
    """
    source = config.train.init_from
    recorded = _recorded(Path(source)) if source else None
    if recorded is None:
        return
    model, method = recorded
    name = method.objective
    known = built_in(Objective).get(name)
    where = f"train.init_from: {source} was trained with"
    if known is not None and issubclass(known, FlowMap) and not objective.two_times:
        raise UserError(
            f"{where} {name}, so its network has two times; {objective.name} trains one with one time"
        )
    if problem := _other_network(config, model):
        raise UserError(f"{where} {problem}")
    if not (objective.two_times or config.data.pairs.samples):
        return
    if objective.two_times and known is not None and not known.predicts_velocity:
        raise UserError(
            f"{where} {name}; {objective.name} starts from a network that predicts the velocity, such as "
            "one of flow-matching"
        )
    if known is not None and not _same_prediction(known, objective):
        raise UserError(
            f"{where} {name}, whose prediction is not that of {objective.name}; name another run, or set "
            "train.init_from: null"
        )
    if problem := _other_path(config, objective, method):
        raise UserError(f"{where} {problem}")


def same_path(one: paths.Path, other: paths.Path) -> bool:
    """Whether alpha_t and sigma_t of two paths differ by at most 1e-3."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    differences = torch.cat([one.alpha(t) - other.alpha(t), one.sigma(t) - other.sigma(t)]).abs()
    return bool((differences <= COEFFICIENT_TOLERANCE + 1e-9).all())


def _other_network(config: RunConfig, theirs: ModelSection) -> str:
    """The first key in which the recorded network differs; empty for the same network."""
    # Absent keys are derived from the data set once it is there.
    left_out = [*NOT_IN_WEIGHTS, *absent_keys(config).get("model", ())]
    if len(config.model.channel_multipliers) == 1:
        left_out.append("resample_with_residual_blocks")  # a U-Net of one resolution does not resample
    for key in ModelSection.model_fields:
        one, other = getattr(theirs, key), getattr(config.model, key)
        if key not in left_out and one != other:
            return f"model.{key} {one}, not {other}"
    return ""


def _same_prediction(known: type[Objective], objective: Objective) -> bool:
    ours = type(objective)
    if ours not in built_in(Objective).values():
        return True  # what a class of the user predicts is not known
    return (known.predicts_velocity and ours.predicts_velocity) or known.velocity_from is ours.velocity_from


def _other_path(config: RunConfig, objective: Objective, theirs: MethodSection) -> str:
    """The key in which the recorded path differs; empty for the same path."""
    ours = config.method
    if (theirs.path, theirs.path_options) == (ours.path, ours.path_options):
        return ""
    # A class that only the record names is not imported.
    if ":" not in theirs.path and same_path(path_named(theirs.path, theirs.path_options), objective.path):
        return ""
    if theirs.path != ours.path:
        return f"method.path {theirs.path}, not {ours.path}"
    return f"method.path_options {theirs.path_options}, not {ours.path_options}"


def _recorded(source: Path) -> tuple[ModelSection, MethodSection] | None:
    """The sections of a run directory or weights file; None if it has no record that can be read."""
    if source.is_dir():
        if not (source / "config.yaml").exists():
            return None
        config = recorded_config(source)
        return config.model, config.method
    try:
        recipe = read_recipe(source)
        return ModelSection.model_validate(recipe["model"]), MethodSection.model_validate(recipe["method"])
    except (UserError, KeyError, ValidationError):
        return None
