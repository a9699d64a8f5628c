"""Results at few evaluations over seeds: the best solver of each objective, the students, and verdicts.

The best solver for a number of evaluations is chosen separately for each seed, as the one with the lowest
mean distance over the other seeds. Its distance at this seed is therefore not biased by the choice. With one
seed the choice and the distance are of the same images, and the distance is too low by the selection.
"""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
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

    Args:
        groups: records of the runs by experiment, one per seed.
        candidate: name of the experiment with flow matching on the optimal-transport path.
        config: the configuration of the comparison, as a tree.
    """
    scored = {
        name: [seed["few_steps"] for seed in seeds]
        for name, seeds in groups.items()
        if all(seed.get("few_steps") for seed in seeds)
    }
    if not scored:
        return {}
    settings = config["reproduce"]["few_steps"]
    seeds = len(next(iter(scored.values())))
    curves = {
        name: [_best_at(each, budget) for budget in settings["nfe"] if candidates(each, budget)]
        for name, each in scored.items()
    }
    students = {
        student["name"]: _student(student["name"], scored[settings["teacher"]], settings["student_nfe"])
        for student in settings["students"]
        if settings["teacher"] in scored
    }
    return {
        "images": config["sample"]["images"],
        "seeds": seeds,
        "error_is": "deviation over seeds" if seeds > 1 else "the estimator's standard error",
        "solvers": curves,
        "exact": {name: _exact(each) for name, each in scored.items()},
        "students": students,
        "verdicts": [
            *_cost_verdicts(scored, settings["nfe"], candidate),
            *_exact_verdict(scored, candidate),
            *_student_verdicts(scored, settings, students),
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


def _distance_of(point: Record) -> float:
    return point[DISTANCE]


def _best_at(scored: Sequence[Record], budget: int) -> dict[str, Any]:
    """Record of the best solver with at most `budget` evaluations."""
    (solver, steps), chosen = best_solver(scored, budget, _distance_of)
    return {"nfe": budget, "solver": solver, "steps": steps, **_scores(chosen)}


def _scores(points: Sequence[Record]) -> dict[str, Any]:
    """Distance with its deviation over seeds, and means of the other scores; one point per seed."""
    distance = over_seeds(_distances(points))
    record: dict[str, Any] = {"value": distance.value, "stderr": distance.stderr}
    for name in ("kernel_distance", "recognized", "error"):
        if all(name in point for point in points):
            record[name] = fmean(point[name] for point in points)
    return record


def _distances(points: Sequence[Record]) -> list[Measured]:
    return [Measured(point[DISTANCE], point[f"{DISTANCE}_stderr"]) for point in points]


def _exact(scored: Sequence[Record]) -> dict[str, Any]:
    points = [each["exact"] for each in scored]
    return {"nfe": fmean(point["nfe"] for point in points), **_scores(points)}


def _student(name: str, scored: Sequence[Record], budgets: Sequence[int]) -> dict[str, Any]:
    runs = [each["students"][name] for each in scored]
    by_steps = [{point["nfe"]: point for point in run["points"]} for run in runs]
    return {
        "title": runs[0]["title"],
        "steps": runs[0]["steps"],
        "runs": [run["run"] for run in runs],
        "points": [{"nfe": count, **_scores([each[count] for each in by_steps])} for count in budgets],
    }


def _cost_verdicts(
    scored: Mapping[str, Sequence[Record]], budgets: Sequence[int], candidate: str
) -> list[list[str]]:
    """Whether the candidate needs fewer evaluations than each other, both with their own best solvers."""
    if candidate not in scored:
        return []
    curves = {name: _curve(each, budgets) for name, each in scored.items()}
    question = "Reaches the other's best distance with fewer evaluations, each with its own solvers"
    return [
        [question, name, compare_cost(curves[candidate], curve, "evaluations").text]
        for name, curve in curves.items()
        if name != candidate
    ]


def _curve(scored: Sequence[Record], budgets: Sequence[int]) -> list[CurvePoint]:
    return [
        CurvePoint(budget, mean_of_seeds(_distances(best_solver(scored, budget, _distance_of)[1])))
        for budget in budgets
        if candidates(scored, budget)
    ]


def _exact_verdict(scored: Mapping[str, Sequence[Record]], candidate: str) -> list[list[str]]:
    """Distance of the candidate with few evaluations, minus that of dopri5 from the same noise."""
    seeds = scored.get(candidate, [])
    if not seeds or not candidates(seeds, AT_EXACT):
        return []
    _, few = best_solver(seeds, AT_EXACT, _distance_of)
    differences = [point[DISTANCE] - each["exact"][DISTANCE] for each, point in zip(seeds, few, strict=True)]
    if len(seeds) == 1:
        words = f"{differences[0]:+.2f}; {ONE_SEED}"
    else:
        difference = Measured(fmean(differences), stdev(differences) / sqrt(len(seeds)), len(seeds))
        threshold = critical_deviation(difference, Measured(0.0, 0.0))
        clear = abs(difference.value) > threshold * difference.stderr
        result = ("worse" if difference.value > 0 else "better") if clear else "not distinguishable"
        words = (
            f"{result}: {difference.value:+.2f} ± {difference.stderr:.2f} over {len(seeds)} seeds "
            f"({threshold:.1f} standard errors are needed)"
        )
    nfe = fmean(each["exact"]["nfe"] for each in seeds)
    return [[f"As good with {AT_EXACT} evaluations as dopri5 with {nfe:.0f}", candidate, words]]


def _student_verdicts(
    scored: Mapping[str, Sequence[Record]], settings: Record, students: Mapping[str, Record]
) -> list[list[str]]:
    """Distance of each student relative to the teacher's with dopri5, and with Euler's method."""
    rows = list[list[str]]()
    seeds = scored.get(settings["teacher"], [])
    for name, student in students.items():
        for count in settings["student_nfe"]:
            own = [
                next(point for point in each["students"][name]["points"] if point["nfe"] == count)
                for each in seeds
            ]
            words = f"{_ratio(own, [each['exact'] for each in seeds])} of the teacher's with dopri5"
            euler = [points_of(each).get(("euler", count)) for each in seeds]
            if all(euler):
                words += f", {_ratio(own, [point for point in euler if point])} of Euler's with {count}"
            plural = "evaluation" if count == 1 else "evaluations"
            rows.append([f"Distance with {count} {plural}", student["title"], words])
    return rows


def _ratio(points: Sequence[Record], others: Sequence[Record]) -> str:
    """The ratio of distances, with its deviation over seeds."""
    ratios = [point[DISTANCE] / other[DISTANCE] for point, other in zip(points, others, strict=True)]
    value = over_seeds([Measured(ratio, 0.0) for ratio in ratios])
    if len(ratios) == 1:
        return f"{_short(value.value)} times"
    return f"{_short(value.value)} ± {_short(value.stderr)} times"


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"
