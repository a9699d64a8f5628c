"""Checks of the training of flow maps, before a process starts."""

from pathlib import Path
from typing import Any

from fm_core.checkpoint.weights_file import read_recipe
from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.method.flow_map import FlowMap
from fm_core.method.objectives import Objective
from fm_core.method.registry import built_in
from fm_core.run.directory import recorded_config


def check_flow_map(config: RunConfig, objective: Objective) -> None:
    """Check that an objective with two times can be trained with this configuration. Raises UserError."""
    if not objective.two_times:
        return
    if config.train.zero_stage == 3:
        raise UserError(
            f"train.zero_stage 3: {objective.name} also evaluates the network outside of the engine, where "
            "the weights are not gathered; use stage 1 or 2"
        )
    guidance = objective.guidance if isinstance(objective, FlowMap) else 1.0
    if guidance != 1 and not (config.model.class_conditional and config.train.label_dropout):
        raise UserError(
            f"method.objective_options guidance {guidance:g}: it needs model.class_conditional: "
            "true and train.label_dropout, e.g. 0.1, for the velocity without label"
        )


def check_teacher(config: RunConfig, objective: Objective) -> None:
    """Check that the weights of train.init_from are those of a velocity on the path of a flow map.

    A run directory and a file of this program are checked; another file has no record. Raises UserError.
    """
    source = config.train.init_from
    recipe = _recipe(Path(source)) if objective.two_times and source else None
    if recipe is None:
        return
    teacher, ours = recipe["method"], config.method
    known = built_in(Objective).get(teacher["objective"])
    if known is not None and not known.predicts_velocity:
        raise UserError(
            f"train.init_from: {source} was trained with {teacher['objective']}; {objective.name} starts "
            "from a network that predicts the velocity, such as one of flow-matching"
        )
    for key, one, other in (
        ("method.path", teacher["path"], ours.path),
        ("method.path_options", teacher["path_options"], ours.path_options),
        ("model.time_scale", recipe["model"].get("time_scale", 1000.0), config.model.time_scale),
    ):
        if one != other:
            raise UserError(f"train.init_from: {source} was trained with {key} {one}, not {other}")


def _recipe(source: Path) -> dict[str, Any] | None:
    """The sections method and model of a run directory or weights file; None if it has no record."""
    if source.is_dir():
        if not (source / "config.yaml").exists():
            return None
        config = recorded_config(source)
        return {"method": config.method.model_dump(), "model": config.model.model_dump()}
    try:
        return read_recipe(source)
    except UserError:
        return None
