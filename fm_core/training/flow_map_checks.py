"""Checks of the training of flow maps, before a process starts."""

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.method.flow_map import FlowMap
from fm_core.method.objectives import Objective


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
