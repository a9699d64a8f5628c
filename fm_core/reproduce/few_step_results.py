"""Results at few evaluations over seeds: the best solver of each objective, the students, and verdicts.

The best solver for a number of evaluations is chosen separately for each seed, as the one with the lowest
mean distance over the other seeds. Its distance at this seed is therefore not biased by the choice. With one
seed the choice and the distance are of the same images, and the distance is too low by the selection.
"""

from collections.abc import Callable, Mapping, Sequence
from math import hypot, sqrt
from statistics import fmean, stdev
from typing import Any

from fm_core.reproduce.claims import (
    ONE_SEED,
    CurvePoint,
    Measured,
    compare_cost,
    critical_deviation,
    mean_of_seeds,
    over_seeds,
)

Record = Mapping[str, Any]
Points = Mapping[tuple[str, int], Record]
"""Records of one run by solver and number of steps."""
DISTANCE = "frechet_distance"
AT_EXACT = 8
"""Number of evaluations whose distance is compared with that of the adaptive solver."""


def few_step_results(
    groups: Mapping[str, Sequence[Record]], candidate: str, config: Record
) -> dict[str, Any]:
    """The results for results.json; empty if no experiment was scored at few evaluations.

    `solvers` and `exact` are by experiment, `students` by name. Each says over how many seeds it is: failed
    runs are left out.

    Args:
        groups: records of the runs by experiment, one per seed.
        candidate: name of the experiment with flow matching on the optimal-transport path.
        config: the configuration of the comparison, as a tree.
    """
    settings = config["reproduce"]["few_steps"]
    few = {
        name: [seed["few_steps"] for seed in seeds if seed.get("few_steps")] for name, seeds in groups.items()
    }
    if not any(few.values()):
        return {}
    scored = {
        name: seeds for name, each in few.items() if (seeds := [seed for seed in each if seed["points"]])
    }
    curves = {
        name: {
            "seeds": len(each),
            "points": [_best_at(each, budget) for budget in settings["nfe"] if candidates(each, budget)],
        }
        for name, each in scored.items()
    }
    taught = few.get(settings["teacher"], [])
    students = {
        student["name"]: _student(student["name"], taught, settings["student_nfe"])
        for student in settings["students"]
        if any(student["name"] in seed["students"] for seed in taught)
    }
    return {
        "images": config["sample"]["images"],
        "solvers": {name: curve for name, curve in curves.items() if curve["points"]},
        "exact": {name: _exact(each) for name, each in scored.items()},
        "students": students,
        "verdicts": [
            *cost_verdicts(scored, settings["nfe"], candidate, _measured),
            *_exact_verdict(scored, candidate),
            *_student_verdicts(taught, settings, students),
        ],
    }


def points_of(scored: Record) -> Points:
    """The points of one run by solver and number of steps."""
    return {(point["solver"], point["steps"]): point for point in scored["points"]}


def candidates(scored: Sequence[Record], budget: int) -> list[tuple[str, int]]:
    """Solvers and steps that every seed has with at most `budget` evaluations, sorted."""
    fitting = [
        {key for key, point in points_of(each).items() if point["nfe"] <= budget + 1e-6} for each in scored
    ]
    return sorted(set[tuple[str, int]].intersection(*fitting))


def best_solver(
    scored: Sequence[Record], budget: int, loss: Callable[[Record], float]
) -> tuple[tuple[str, int], list[Record]]:
    """The solver and steps with the least mean loss, and the point of each seed.

    The point of a seed is that of the solver with the least mean loss over the other seeds.

    Raises:
        ValueError: no solver has so few evaluations.
    """
    points, keys = [points_of(each) for each in scored], candidates(scored, budget)

    def best_over(seeds: Sequence[Points]) -> tuple[str, int]:
        return min(keys, key=lambda key: fmean(loss(each[key]) for each in seeds))

    others = [[each for other, each in enumerate(points) if other != seed] for seed in range(len(points))]
    chosen = [own[best_over(rest or points)] for own, rest in zip(points, others, strict=True)]
    return best_over(points), chosen


def _best_at(scored: Sequence[Record], budget: int) -> dict[str, Any]:
    """Record of the best solver with at most `budget` evaluations."""
    (solver, steps), chosen = best_solver(scored, budget, _distance_of)
    return {"nfe": budget, "solver": solver, "steps": steps, **_scores(chosen)}


def _distance_of(point: Record) -> float:
    return point[DISTANCE]


def _scores(points: Sequence[Record]) -> dict[str, Any]:
    """Distance with its deviation over seeds, and means of the other scores; one point per seed."""
    distance = over_seeds([_measured(point) for point in points])
    record: dict[str, Any] = {"value": distance.value, "stderr": distance.stderr}
    if len(points) == 1 and points[0].get("unreliable"):
        record["unreliable"] = points[0]["unreliable"]
    for name in ("kernel_distance", "recognized", "error"):
        if all(name in point for point in points):
            record[name] = fmean(point[name] for point in points)
    return record


def _measured(point: Record) -> Measured:
    return Measured(point[DISTANCE], point[f"{DISTANCE}_stderr"])


def _exact(scored: Sequence[Record]) -> dict[str, Any]:
    points = [each["exact"] for each in scored]
    solver = points[0]["solver"]
    return {"solver": solver, "nfe": fmean(point["nfe"] for point in points), **_scores(points)}


def _student(name: str, taught: Sequence[Record], budgets: Sequence[int]) -> dict[str, Any]:
    runs = [seed["students"][name] for seed in taught if name in seed["students"]]
    by_steps = [{point["steps"]: point for point in run["points"]} for run in runs]
    return {
        "title": runs[0]["title"],
        "seeds": len(runs),
        "steps": runs[0]["steps"],
        "runs": [run["run"] for run in runs],
        "points": [{"nfe": count, **_scores([each[count] for each in by_steps])} for count in budgets],
    }


def cost_verdicts(
    scored: Mapping[str, Sequence[Record]],
    budgets: Sequence[int],
    candidate: str,
    distance: Callable[[Record], Measured],
) -> list[list[str]]:
    """Whether the candidate needs fewer evaluations than each other, both with their own best solvers.

    `scored` has the records of all seeds by experiment, `distance` is the distance of a point. Each row is a
    question, the other experiment and the answer.
    """
    curves = {name: curve for name, each in scored.items() if (curve := _curve(each, budgets, distance))}
    if candidate not in curves:
        return []
    question = "Reaches the other's best distance with fewer evaluations, each with its own solvers"
    return [
        [question, name, compare_cost(curves[candidate], curve, "evaluations").text]
        for name, curve in curves.items()
        if name != candidate
    ]


def _curve(
    scored: Sequence[Record], budgets: Sequence[int], distance: Callable[[Record], Measured]
) -> list[CurvePoint]:
    """Distances by evaluations, without numbers at which the solver is that of a smaller number.

    Otherwise one measurement would be resampled as if it were several.
    """
    curve, before = list[CurvePoint](), list[tuple[str, int]]()
    for budget in budgets:
        if not candidates(scored, budget):
            continue
        _, chosen = best_solver(scored, budget, lambda point: distance(point).value)
        keys = [(point["solver"], point["steps"]) for point in chosen]
        if keys != before:
            curve.append(CurvePoint(budget, mean_of_seeds([distance(point) for point in chosen])))
        before = keys
    return curve


def _exact_verdict(scored: Mapping[str, Sequence[Record]], candidate: str) -> list[list[str]]:
    """Distance of the candidate with few evaluations, minus that of its samples from the same noise."""
    seeds = scored.get(candidate, [])
    if not seeds or not candidates(seeds, AT_EXACT):
        return []
    _, few = best_solver(seeds, AT_EXACT, _distance_of)
    differences = [point[DISTANCE] - each["exact"][DISTANCE] for each, point in zip(seeds, few, strict=True)]
    if len(seeds) == 1:
        text = f"{differences[0]:+.2f}; {ONE_SEED}"
    else:
        difference = Measured(fmean(differences), stdev(differences) / sqrt(len(seeds)), len(seeds))
        threshold = critical_deviation(difference, Measured(0.0, 0.0))
        clear = abs(difference.value) > threshold * difference.stderr
        result = ("worse" if difference.value > 0 else "better") if clear else "not distinguishable"
        text = (
            f"{result}: {difference.value:+.2f} ± {difference.stderr:.2f} over {len(seeds)} seeds "
            f"({threshold:.1f} standard errors are needed)"
        )
    exact = _exact(seeds)
    return [
        [
            f"As good with {AT_EXACT} evaluations as {exact['solver']} with {exact['nfe']:.0f}",
            candidate,
            text,
        ]
    ]


def _student_verdicts(
    taught: Sequence[Record], settings: Record, students: Mapping[str, Record]
) -> list[list[str]]:
    """Distance of each student, relative to those of its teacher's samples and by Euler's method."""
    rows = list[list[str]]()
    for name, student in students.items():
        seeds = [seed for seed in taught if name in seed["students"]]
        for count in settings["student_nfe"]:
            own = [
                next(point for point in seed["students"][name]["points"] if point["steps"] == count)
                for seed in seeds
            ]
            exact = [seed["exact"] for seed in seeds]
            text = f"{_ratio(own, exact)} the teacher's distance by {exact[0]['solver']}"
            euler = [points_of(seed).get(("euler", count)) for seed in seeds]
            if all(euler):
                text += f"; {_ratio(own, [point for point in euler if point])} that by euler with {count}"
            if len(seeds) == 1:
                text += f"; {ONE_SEED}"
            plural = "evaluation" if count == 1 else "evaluations"
            rows.append([f"Distance with {count} {plural}", student["title"], text])
    return rows


def _ratio(points: Sequence[Record], others: Sequence[Record]) -> str:
    """The ratio of distances: its mean and deviation over seeds, or one seed's with the estimator's error."""
    ratios = [
        Measured(ratio, ratio * hypot(_relative_error(point), _relative_error(other)))
        for point, other in zip(points, others, strict=True)
        for ratio in [point[DISTANCE] / other[DISTANCE]]
    ]
    value = over_seeds(ratios)
    return f"{_short(value.value)} ± {_short(value.stderr)} times"


def _relative_error(point: Record) -> float:
    return point[f"{DISTANCE}_stderr"] / abs(point[DISTANCE])


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"
