"""Samples in 2-D with few evaluations: every solver of a list, and the best one for each number."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fm_core.config import FewStepsSection, NfeCurveSection
from fm_core.evaluation.nfe_curve import solver_settings
from fm_core.method.objectives import Objective
from fm_core.method.ode import Solution, solve
from fm_core.method.solver import FLOW_MAP
from fm_core.method.types import Velocity
from fm_core.report.html import PageSection, Table
from fm_core.reproduce.claims import Measured, over_seeds
from fm_core.reproduce.few_step_results import best_solver, candidates, cost_verdicts
from fm_core.reproduce.toy2d.checkerboard import CELLS, cell_distance, expected_distance, on_squares

DISTANCE = f"total variation on {CELLS} cells"
"""The distance by which solvers are compared; part of the recipe of the scores."""
NOTE = (
    f"Distance of the samples to the data, {DISTANCE} (0: equal, 1: disjoint), with the best of {{count}} "
    "solvers and time grids for each objective and number of evaluations; then the share of samples on the "
    "data's squares, and the RMS difference from the exact solution of the same noise. As many points of the "
    "data have a distance of {floor:.3f}. {chosen} A flow map is sampled as such, with one evaluation per "
    "step, and a reflow student by Euler's method; their errors are against their own solutions."
)
Record = dict[str, Any]


def few_evaluations(
    velocity: Velocity, noise: Tensor, exact: Solution, objective: Objective, settings: FewStepsSection
) -> Record:
    """Solve the ODE from `noise` [N, 2] with every solver and number of evaluations of the settings.

    `exact` is the solution of the adaptive solver. Returns its scores as `exact`, and as `points` for each
    solver and number of steps the evaluations `nfe`, the scores of `distance_to_data`, and `error`, the RMS
    difference from the exact solution.

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
                **distance_to_data(run.x),
                "error": (run.x - exact.x).double().square().mean().sqrt().item(),
            }
        )
    return {"points": points, "exact": {"nfe": exact.nfe, **distance_to_data(exact.x)}}


def distance_to_data(x: Tensor) -> Record:
    """The `distance` of points [N, 2] to the data, and their share `on_squares`."""
    return {"distance": cell_distance(x), "on_squares": on_squares(x).float().mean().item()}


def few_evaluations_section(results: Mapping[str, Any]) -> list[PageSection]:
    """The tables from the content of results.json; empty if there are none."""
    groups = dict[str, list[Record]]()
    for record in results["cells"].values():
        few = record.get("few_steps")
        if isinstance(few, dict):  # a list, without distances, in results of an earlier version
            few = few | {"budgets": record["scoring"]["few_steps"]["nfe"], "title": record["title"]}
            few |= {"student": "teacher" in record["recipe"]}
            groups.setdefault(record["experiment"], []).append(few)
    if not groups:
        return []
    budgets = sorted({budget for scored in groups.values() for each in scored for budget in each["budgets"]})
    seeds = max(map(len, groups.values()))
    chosen = (
        "The solver is chosen for each seed by the other seeds; the named one is the best over all, and ± is "
        "the deviation over seeds."
        if seeds > 1
        else "It is chosen by these distances themselves, which are therefore too low."
    )
    rows = [
        [scored[0]["title"], *(_cell(scored, budget) for budget in budgets), _exact_cell(scored)]
        for scored in groups.values()
    ]
    head = ["objective", *(f"NFE {budget}" for budget in budgets), "dopri5"]
    floor = expected_distance(results["protocol"]["samples"])
    note = NOTE.format(count=len(results["few_steps"]["solvers"]), chosen=chosen, floor=floor)
    parts = [Table(head, rows), *_verdicts(results, groups)]
    return [PageSection("Few evaluations, each objective with its best solver", parts, note)]


def few_curve(objective: Objective, settings: FewStepsSection) -> NfeCurveSection:
    """The solvers of an objective and their numbers of evaluations, as a section evaluate.nfe_curve."""
    solvers = (FLOW_MAP,) if objective.two_times else settings.solvers
    return NfeCurveSection(images=4, solvers=solvers, nfe=settings.nfe, tolerances=())


def _cell(scored: Sequence[Mapping[str, Any]], budget: int) -> str:
    if budget not in scored[0]["budgets"] or not candidates(scored, budget):
        return ""
    (solver, _), chosen = best_solver(scored, budget, lambda point: point["distance"])
    error = over_seeds([Measured(point["error"], 0.0) for point in chosen])
    return f"{_scores(chosen)}, error {error.value:.2f}, {solver}"


def _exact_cell(scored: Sequence[Mapping[str, Any]]) -> str:
    nfe = over_seeds([Measured(each["exact"]["nfe"], 0.0) for each in scored])
    return f"{_scores([each['exact'] for each in scored])}, NFE {nfe.value:.0f}"


def _scores(points: Sequence[Mapping[str, Any]]) -> str:
    distance, share = (
        over_seeds([Measured(point[key], 0.0) for point in points]) for key in ("distance", "on_squares")
    )
    deviation = f" ± {distance.stderr:.3f}" if len(points) > 1 else ""
    return f"{distance.value:.3f}{deviation}, {share.value:.0%}"


def _verdicts(results: Mapping[str, Any], groups: Mapping[str, Sequence[Record]]) -> list[Table]:
    """Whether flow matching on the optimal-transport path needs fewer evaluations than the others.

    Only with several seeds: the distances have no standard error otherwise.
    """
    candidate = results["few_steps"]["candidate"]
    objectives = {name: each for name, each in groups.items() if not each[0]["student"]}
    if candidate not in objectives or min(map(len, objectives.values())) < 2:
        return []
    rows = [
        [question, groups[name][0]["title"], answer]
        for question, name, answer in cost_verdicts(
            objectives, results["few_steps"]["nfe"], candidate, _measured
        )
    ]
    return [Table(["question", f"{groups[candidate][0]['title']} against", "answer"], rows)] if rows else []


def _measured(point: Mapping[str, Any]) -> Measured:
    return Measured(point["distance"], 0.0)
