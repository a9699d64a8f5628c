"""The results of a sweep, as in results.json: points with errors, the best one, and its fresh samples."""

from collections.abc import Mapping, Sequence
from typing import Any

from fm_core.config import RunConfig
from fm_core.report.score_columns import columns_of
from fm_core.report.score_text import distance_title, with_error
from fm_core.sweep.point_ranking import LEVEL, OPEN, ScoredPoint, best_of, check_record, ranked
from fm_core.sweep.seed_means import seed_means
from fm_core.sweep.sweep_points import SweepPoint

DIGITS = {"kernel_distance": 5, "precision": 3, "recall": 3}
"""Decimal places of a metric; 2 for the others."""
NOT_ON_ONE_SCALE = (
    "there is no best point: the scores are of different features, references or numbers of images"
)
Results = dict[str, Any]


def results_of(config: RunConfig, points: Sequence[SweepPoint], scored: Sequence[ScoredPoint]) -> Results:
    """The results before the best point is scored again. Points without scores are left out."""
    metric = config.sweep.metric
    records = [_record(metric, points.index(each.point), each) for each in scored]
    results: Results = {
        "run": config.run.name,
        "data": config.data.name,
        "metric": metric,
        "title": metric_title(metric, scored),
        "axes": {key: list(values) for key, values in config.sweep.axes.items()},
        "points": records,
        "notes": {},
        "summary": f"{len(scored)} of {len(points)} points scored; {NOT_ON_ONE_SCALE}"
        if scored
        else "no point could be scored",
    }
    best = best_of(metric, scored)
    if means := seed_means(metric, records, comparable=best is not None):
        results["over_seeds"] = means
    if best is None:
        return results
    comparisons = ranked(metric, scored, best)
    for record, comparison in zip(records, comparisons, strict=True):
        record["verdict"] = comparison.verdict
        if difference := comparison.difference:
            record["difference"] = {
                "value": difference.value,
                "stderr": difference.stderr,
                "paired": difference.paired,
                **({"unreliable": difference.unreliable} if difference.unreliable else {}),
            }
    still_open = [record["point"] for record in records if record["verdict"] == OPEN]
    results["best"] = {
        "number": records[best]["number"],
        "point": records[best]["point"],
        "of_points": len(scored),
        "not_distinguishable": still_open,
        "level": LEVEL,
    }
    results["summary"] = _summary(results, records[best])
    return results


def with_check(results: Results, chosen: ScoredPoint, fresh: ScoredPoint) -> Results:
    """The results with the score of the best point on fresh samples."""
    metric = results["metric"]
    record = check_record(metric, chosen, fresh)
    best = {**results["best"], "fresh": record}
    updated = {**results, "best": best}
    updated["notes"] = {"fresh samples": check_text(updated)}
    return updated


def check_text(results: Mapping[str, Any]) -> str:
    """The score of the best point on fresh samples in one line."""
    fresh, digits = results["best"]["fresh"], digits_of(results["metric"])
    text = f"{with_error(fresh, digits)} on {fresh['images']:,} fresh samples of seed {fresh['seed']}"
    change = fresh.get("change")
    if change is None:
        return f"{text}; not comparable with the value in the sweep, which is of another number of images"
    sign = "+" if change["value"] > 0 else ""
    return f"{text}; change from its value in the sweep {sign}{with_error(change, digits)}"


def digits_of(metric: str) -> int:
    """Decimal places with which a metric is shown."""
    return DIGITS.get(metric, 2)


def metric_title(metric: str, scored: Sequence[ScoredPoint]) -> str:
    """Name of a metric in tables and figures, with the features of a Fréchet distance."""
    features = {str(each.scores[metric].get("features")) for each in scored}
    if metric == "frechet_distance":
        return distance_title(features.pop()) if len(features) == 1 else "Fréchet distance"
    if metric == "inception_score" and any("alias_of" in each.scores[metric] for each in scored):
        return "classifier score"
    return metric.replace("_", " ")


def _summary(results: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    count, points = len(results["best"]["not_distinguishable"]), results["best"]["of_points"]
    value = with_error(best[results["metric"]], digits_of(results["metric"]))
    others = f"{count} of the {points - 1} others not distinguishable" if points > 1 else "the only point"
    return f"best of {points} points: {best['point']}, {results['title']} {value}; {others}"


def _record(metric: str, number: int, each: ScoredPoint) -> Results:
    scores = each.scores
    names = {column.key for column in columns_of([scores])} | {"extractors"}
    names = names & scores.keys() | {metric}
    return {
        "number": number,
        "point": each.point.title,
        "values": dict(each.point.values),
        "run": each.point.config.run.name,
        "step": scores.get("step"),
        "scores_file": str(each.file),
        **{name: scores[name] for name in sorted(names)},
    }
