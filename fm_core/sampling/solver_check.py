"""Compatibility of a solver with the path, the objective and the training coupling of a model."""

from fm_core.errors import UserError
from fm_core.method.couplings import Independent
from fm_core.method.flow_map import FlowMap
from fm_core.method.objectives import Objective
from fm_core.method.solver import FLOW_MAP, Solver
from fm_core.method.step_loop import check_steps
from fm_core.storage.philox import MAX_INDEX


def check_solver(
    solver: Solver, objective: Objective, coupling: str, key: str = "sample", guidance: float = 1.0
) -> None:
    """Check that a solver can sample a model, before any computation.

    Args:
        solver: the solver with its grid.
        objective: the training objective, on its path.
        coupling: name of the training coupling.
        key: the configuration section of the solver, for error messages.
        guidance: the guidance scale of the samples.

    Raises:
        UserError: the solver or its grid needs E[x1 | x_t] or the score, and the velocity does not determine
            it; the grid does not fit the interval; or the solver is that of flow maps, and the model has one
            time or is to be guided.
    """
    if solver.method == FLOW_MAP:
        _check_flow_map(objective, key, guidance)
    if solver.needs_path and not objective.follows_path:
        what = f"solver {solver.method}" if solver.grid.name == "uniform" else f"grid {solver.grid.name}"
        raise UserError(
            f"{key}.{what}: a model of {objective.name or type(objective).__name__} has a velocity that does "
            "not follow the path; use a solver of torchdiffeq, such as dopri5 or midpoint, on a uniform grid"
        )
    if solver.stochastic and coupling != Independent.name:
        raise UserError(
            f"{key}.solver {solver.method} adds noise by the score, and a model trained with the coupling "
            f"{coupling} does not determine it; use a deterministic solver"
        )
    if solver.stochastic and (solver.steps or 0) > MAX_INDEX:
        raise UserError(f"{key}.steps {solver.steps}: a stochastic solver takes at most {MAX_INDEX:,} steps")
    check_steps(solver, objective.interval, objective.path)


def check_guidance(objective: Objective, guidance: float, key: str = "sample") -> None:
    """Refuse classifier-free guidance of a model that has learned guidance, which would be applied twice.

    `guidance` is the scale, and 1 if a weaker model guides. Raises UserError.
    """
    learned = objective.guidance if isinstance(objective, FlowMap) else 1.0
    if learned != 1 and guidance != 1:
        where = "" if key == "sample" else f"{key}: "
        raise UserError(
            f"{where}sample.guidance {guidance:g}: the model has learned guidance of scale {learned:g} "
            "(method.objective_options), which would be applied twice; set sample.guidance: 1"
        )


def _check_flow_map(objective: Objective, key: str, guidance: float) -> None:
    if not objective.two_times:
        raise UserError(
            f"{key}.solver {FLOW_MAP}: a model of {objective.name or type(objective).__name__} has one time; "
            "train one with method.objective meanflow, or use another solver"
        )
    if guidance != 1:
        raise UserError(
            f"{key}.solver {FLOW_MAP}: sample.guidance {guidance:g} guides a velocity, not a displacement; "
            "train the guided flow map with method.objective_options guidance, or use another solver"
        )
