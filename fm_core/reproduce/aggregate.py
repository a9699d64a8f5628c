"""Aggregation of a comparison's results over seeds, and comparison of its objectives."""

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

FIXED_STEP_SOLVERS = ("euler", "midpoint", "heun2", "rk4")

Record = Mapping[str, Any]


def by_objective(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group records by experiment name, in the order of the experiments; one record per seed in each list."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["cell"], []).append(record)
    return groups


def summary(seeds: Sequence[Record]) -> dict[str, Any]:
    """Results of one objective: mean and deviation over seeds, or one seed's values with their own errors."""
    first = seeds[0]
    record: dict[str, Any] = {
        "title": first["title"] + (f" ({first['steps']:,} steps)" if first["fewer_steps"] else ""),
        "runs": [seed["run"] for seed in seeds],
        "steps": first["steps"],
        "images_seen": first["images_seen"],
        "error_is": "deviation over seeds" if len(seeds) > 1 else "the estimator's standard error",
        "covers": "training seeds" if len(seeds) > 1 else "samples",
        "frechet_distance": _distance_record(seeds),
        "nfe": asdict(over_seeds([Measured(seed["scores"]["nfe"]["mean"], 0.0) for seed in seeds])),
    }
    bits = [seed["scores"]["bits_per_dim"] for seed in seeds if "bits_per_dim" in seed["scores"]]
    if len(bits) == len(seeds):
        record["bits_per_dim"] = {**_number(bits), "k": 1}
        if all("k_sample" in each for each in bits):
            draws = [each["k_sample"] for each in bits]
            record["bits_per_dim_k_sample"] = {**_number(draws), "k": draws[0]["k"]}
    return record


def claims(records: Sequence[Record], candidate: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Verdicts on the paper's three claims against each baseline: claim -> baseline experiment -> record.

    Args:
        records: records of the runs.
        candidate: name of the experiment with flow matching on the optimal-transport path.
    """
    groups = by_objective(records)
    if candidate not in groups:
        return {}
    verdicts: dict[str, dict[str, dict[str, Any]]] = {}
    candidate_seeds = groups[candidate]
    for name, baseline in groups.items():
        if name == candidate:
            continue
        by_claim = {"samples": compare_quality(_distance(candidate_seeds), _distance(baseline))}
        budgets = over_budgets(candidate_seeds), over_budgets(baseline)
        if all(budgets):
            by_claim["evaluations"] = compare_cost(*budgets, "evaluations")
        training = while_training(candidate_seeds), while_training(baseline)
        if all(training):
            by_claim["training"] = compare_cost(*training, "images")
        for claim, verdict in by_claim.items():
            verdicts.setdefault(claim, {})[name] = verdict.record()
    return verdicts


def while_training(seeds: Sequence[Record]) -> list[CurvePoint]:
    """Distance against images seen, at the checkpoints that were measured for every seed."""
    return [
        CurvePoint(seen, mean_of_seeds([Measured(p["frechet_distance"], p["stderr"]) for p in points]))
        for seen, points in _by_images_seen(seeds)
    ]


def _by_images_seen(seeds: Sequence[Record]) -> list[tuple[int, list[Record]]]:
    curves = [{point["images_seen"]: point for point in record["while_training"]} for record in seeds]
    shared = sorted(set[int].intersection(*(set(curve) for curve in curves)))
    return [(seen, [curve[seen] for curve in curves]) for seen in shared]


def over_budgets(seeds: Sequence[Record]) -> list[CurvePoint]:
    """Distance against network evaluations; for each budget, the distance of the best fixed-step solver."""
    best: dict[float, Measured] = {}
    for solver in FIXED_STEP_SOLVERS:
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
    points_by_nfe = [
        (
            points[0]["nfe"],
            mean_of_seeds([Measured(p["frechet_distance"], p["frechet_distance_stderr"]) for p in points]),
            sum(p["error"] for p in points) / len(points),
        )
        for points in zip(*curves, strict=True)
    ]
    return sorted(points_by_nfe, key=lambda point: point[0])


def curves(records: Sequence[Record]) -> dict[str, Any]:
    """All curves as plain numbers: `while_training` by experiment, `solvers` by solver and experiment."""
    groups = by_objective(records)
    training = {
        name: [
            {"images_seen": p.cost, "value": p.distance.value, "stderr": p.distance.stderr, "nfe": nfe}
            for p, nfe in zip(while_training(seeds), _nfe_while_training(seeds), strict=True)
        ]
        for name, seeds in groups.items()
    }
    solvers: dict[str, Any] = {}
    for solver in (*FIXED_STEP_SOLVERS, "dopri5"):
        by_name = {name: solver_curve(seeds, solver) for name, seeds in groups.items()}
        if all(by_name.values()):
            solvers[solver] = {
                name: [{"nfe": n, "value": d.value, "stderr": d.stderr, "error": e} for n, d, e in points]
                for name, points in by_name.items()
            }
    return {"while_training": training, "solvers": solvers}


def _nfe_while_training(seeds: Sequence[Record]) -> list[float]:
    return [sum(point["nfe"] for point in points) / len(points) for _, points in _by_images_seen(seeds)]


def _distance(seeds: Sequence[Record]) -> Measured:
    return mean_of_seeds(_measured([record["scores"]["frechet_distance"] for record in seeds]))


def _distance_record(seeds: Sequence[Record]) -> dict[str, Any]:
    """The distance, its number of images, and its limit for infinitely many; errors as in `over_seeds`."""
    records = [seed["scores"]["frechet_distance"] for seed in seeds]
    record: dict[str, Any] = _number(records)
    if all("images" in each for each in records):
        record["images"] = records[0]["images"]
    if all("infinity" in each for each in records):
        record["infinity"] = _number([each["infinity"] for each in records])
    if len(records) == 1 and "unreliable" in records[0]:
        record["unreliable"] = records[0]["unreliable"]
    return record


def _measured(records: Sequence[Record]) -> list[Measured]:
    return [Measured(record["value"], record["stderr"]) for record in records]


def _number(records: Sequence[Record]) -> dict[str, Any]:
    number = over_seeds(_measured(records))
    return {"value": number.value, "stderr": number.stderr}
