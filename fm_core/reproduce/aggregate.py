"""Runs of one comparison, put together: over seeds, and against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fm_core.reproduce.claims import (
    CurvePoint,
    Measured,
    compare_cost,
    compare_quality,
    mean_of_seeds,
    over_seeds,
)

FIXED = ("euler", "midpoint", "heun2", "rk4")

Record = Mapping[str, Any]


def by_objective(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs by the name of their cell, in the order of cells; a list holds the seeds."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["cell"], []).append(record)
    return found


def summary(seeds: Sequence[Record]) -> dict[str, Any]:
    """One objective's numbers: mean and deviation over seeds, or of one seed with its own error."""
    first = seeds[0]
    found: dict[str, Any] = {
        "title": first["title"] + (f" ({first['steps']:,} steps)" if first["fewer_steps"] else ""),
        "runs": [record["run"] for record in seeds],
        "steps": first["steps"],
        "images_seen": first["images_seen"],
        "error_is": "deviation over seeds" if len(seeds) > 1 else "the estimator's standard error",
        "frechet_distance": _number(seeds, "frechet_distance"),
        "nfe": asdict(over_seeds([Measured(record["scores"]["nfe"]["mean"], 0.0) for record in seeds])),
    }
    if all("bits_per_dim" in record["scores"] for record in seeds):
        found["bits_per_dim"] = _number(seeds, "bits_per_dim")
    return found


def claims(records: Sequence[Record], ours: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The paper's three claims against each other objective: claim -> its cell -> factor and words.

    Args:
        records: the runs.
        ours: the cell of flow matching on the optimal-transport path.
    """
    groups = by_objective(records)
    if ours not in groups:
        return {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    mine = groups[ours]
    for cell, other in groups.items():
        if cell == ours:
            continue
        verdicts = {"samples": compare_quality(_distance(mine), _distance(other))}
        budgets = over_budgets(mine), over_budgets(other)
        if all(budgets):
            verdicts["evaluations"] = compare_cost(*budgets, "evaluations")
        training = while_training(mine), while_training(other)
        if all(training):
            verdicts["training"] = compare_cost(*training, "images")
        for claim, verdict in verdicts.items():
            found.setdefault(claim, {})[cell] = asdict(verdict)
    return found


def while_training(seeds: Sequence[Record]) -> list[CurvePoint]:
    """Distance against images seen, where every seed was measured."""
    return [
        CurvePoint(seen, mean_of_seeds([Measured(p["frechet_distance"], p["stderr"]) for p in points]))
        for seen, points in _by_images_seen(seeds)
    ]


def _by_images_seen(seeds: Sequence[Record]) -> list[tuple[int, list[Record]]]:
    curves = [{point["images_seen"]: point for point in record["while_training"]} for record in seeds]
    shared = sorted(set[int].intersection(*(set(curve) for curve in curves)))
    return [(seen, [curve[seen] for curve in curves]) for seen in shared]


def over_budgets(seeds: Sequence[Record]) -> list[CurvePoint]:
    """Distance against evaluations of the network, each budget by its best solver of fixed steps."""
    best: dict[float, Measured] = {}
    for solver in FIXED:
        for nfe, distance, _ in solver_curve(seeds, solver):
            if nfe not in best or distance.value < best[nfe].value:
                best[nfe] = distance
    return [CurvePoint(nfe, best[nfe]) for nfe in sorted(best)]


def solver_curve(seeds: Sequence[Record], solver: str) -> list[tuple[float, Measured, float]]:
    """(evaluations, distance, error against the exact solution) of one solver, by evaluations."""
    curves = [
        [
            point
            for point in record["scores"].get("nfe_curve", {}).get("points", [])
            if point["solver"] == solver
        ]
        for record in seeds
    ]
    found = [
        (
            points[0]["nfe"],
            mean_of_seeds([Measured(p["frechet_distance"], p["frechet_distance_stderr"]) for p in points]),
            sum(p["error"] for p in points) / len(points),
        )
        for points in zip(*curves, strict=True)
    ]
    return sorted(found, key=lambda point: point[0])


def curves(records: Sequence[Record]) -> dict[str, Any]:
    """All curves as plain numbers: `while_training` by cell, `solvers` by solver and cell."""
    groups = by_objective(records)
    training = {
        cell: [
            {"images_seen": p.cost, "value": p.distance.value, "stderr": p.distance.stderr, "nfe": nfe}
            for p, nfe in zip(while_training(seeds), _nfe_while_training(seeds), strict=True)
        ]
        for cell, seeds in groups.items()
    }
    solvers: dict[str, Any] = {}
    for solver in (*FIXED, "dopri5"):
        found = {cell: solver_curve(seeds, solver) for cell, seeds in groups.items()}
        if all(found.values()):
            solvers[solver] = {
                cell: [{"nfe": n, "value": d.value, "stderr": d.stderr, "error": e} for n, d, e in points]
                for cell, points in found.items()
            }
    return {"while_training": training, "solvers": solvers}


def _nfe_while_training(seeds: Sequence[Record]) -> list[float]:
    return [sum(point["nfe"] for point in points) / len(points) for _, points in _by_images_seen(seeds)]


def _distance(seeds: Sequence[Record]) -> Measured:
    return mean_of_seeds(
        [
            Measured(
                record["scores"]["frechet_distance"]["value"], record["scores"]["frechet_distance"]["stderr"]
            )
            for record in seeds
        ]
    )


def _number(seeds: Sequence[Record], name: str) -> dict[str, float]:
    found = over_seeds([Measured(r["scores"][name]["value"], r["scores"][name]["stderr"]) for r in seeds])
    return {"value": found.value, "stderr": found.stderr}
