"""Samples in 2-D with few evaluations: every solver of a list, and the best one for each number."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fm_core.config import FewStepsSection, NfeCurveSection
from fm_core.evaluation.nfe_curve import solver_settings
from fm_core.method.objectives import Objective
from fm_core.method.ode import solve
from fm_core.method.solver import FLOW_MAP
from fm_core.method.types import Velocity
from fm_core.report.html import PageSection, Table
from fm_core.reproduce.claims import Measured, over_seeds
from fm_core.reproduce.few_step_results import best_solver, candidates
from fm_core.reproduce.toy2d.checkerboard import on_squares

NOTE = (
    "Share of samples on the data's squares with the best of {count} solvers and time grids for each "
    "objective and number of evaluations, and the RMS difference from the exact solution of the same "
    "noise. {chosen} A flow map is sampled as such, with one evaluation per step, and a reflow student by "
    "Euler's method; its error is against its own solution."
)
Record = dict[str, Any]


def few_evaluations(
    velocity: Velocity, noise: Tensor, exact: Tensor, objective: Objective, settings: FewStepsSection
) -> list[Record]:
    """Solve the ODE from `noise` [N, 2] with every solver and number of evaluations of the settings.

    `exact` [N, 2] is the solution of the adaptive solver. Returns for each solver and number of steps the
    evaluations `nfe`, the share of points `on_squares`, and the RMS difference from `exact`, `error`.

    Raises:
        UserError: a solver cannot solve the ODE of this objective.
    """
    points = list[Record]()
    for point in solver_settings(few_curve(objective, settings)):
        run = solve(velocity, noise, objective.interval, point.solver, path=objective.path)
        points.append(
            {
                "solver": point.record["solver"],
                "steps": point.record["steps"],
                "nfe": run.nfe,
                "on_squares": on_squares(run.x).float().mean().item(),
                "error": (run.x - exact).double().square().mean().sqrt().item(),
            }
        )
    return points


def few_evaluations_section(results: Mapping[str, Any]) -> list[PageSection]:
    """The table from the content of results.json; empty if there are none."""
    groups = dict[str, list[Mapping[str, Any]]]()
    for record in results["cells"].values():
        if "few_steps" in record:
            points = {"points": record["few_steps"], "budgets": record["scoring"]["few_steps"]["nfe"]}
            groups.setdefault(record.get("title", record["label"]), []).append(points)
    if not groups:
        return []
    budgets = sorted({budget for scored in groups.values() for each in scored for budget in each["budgets"]})
    seeds = max(map(len, groups.values()))
    chosen = (
        "The solver is chosen for each seed by the other seeds; the named one is the best over all, and ± is "
        "the deviation over seeds."
        if seeds > 1
        else "It is chosen by these shares themselves, which are therefore too high."
    )
    rows = [[title, *(_cell(scored, budget) for budget in budgets)] for title, scored in groups.items()]
    head = ["objective", *(f"NFE {budget}" for budget in budgets)]
    note = NOTE.format(count=len(results["few_steps"]["solvers"]), chosen=chosen)
    return [PageSection("Few evaluations, each objective with its best solver", [Table(head, rows)], note)]


def few_curve(objective: Objective, settings: FewStepsSection) -> NfeCurveSection:
    """The solvers of an objective and their numbers of evaluations, as a section evaluate.nfe_curve."""
    solvers = (FLOW_MAP,) if objective.two_times else settings.solvers
    return NfeCurveSection(images=4, solvers=solvers, nfe=settings.nfe, tolerances=())


def _cell(scored: Sequence[Mapping[str, Any]], budget: int) -> str:
    if budget not in scored[0]["budgets"] or not candidates(scored, budget):
        return ""
    (solver, _), chosen = best_solver(scored, budget, lambda point: -point["on_squares"])
    share = over_seeds([Measured(point["on_squares"], 0.0) for point in chosen])
    error = over_seeds([Measured(point["error"], 0.0) for point in chosen])
    deviation = f" ± {share.stderr:.1%}" if len(scored) > 1 else ""
    return f"{share.value:.1%}{deviation}, error {error.value:.2f}, {solver}"
