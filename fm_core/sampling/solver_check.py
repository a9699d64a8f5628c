"""Compatibility of a solver with the path, the objective and the training coupling of a model."""

from fm_core.errors import UserError
from fm_core.method.couplings import Independent
from fm_core.method.objectives import Objective
from fm_core.method.solver import Solver
from fm_core.method.step_loop import check_steps
from fm_core.storage.philox import MAX_INDEX


def check_solver(solver: Solver, objective: Objective, coupling: str, key: str = "sample") -> None:
    """Check that a solver can sample a model, before any computation.

    Args:
        solver: the solver with its grid.
        objective: the training objective, on its path.
        coupling: name of the training coupling.
        key: the configuration section of the solver, for error messages.

    Raises:
        UserError: the solver or its grid needs E[x1 | x_t] or the score, and the velocity does not determine
            it; or the grid does not fit the interval.
    """
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
