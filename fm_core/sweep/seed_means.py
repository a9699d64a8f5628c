"""Means over seeds of the points of a sweep whose runs differ in run.seed."""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from fm_core.report.score_columns import Column, columns_of
from fm_core.sweep.point_ranking import LOWER_IS_BETTER
from fm_core.sweep.sweep_points import SEED, short_names, title_of

NOT_A_MEAN = ("frechet_limit", "classifier")
Record = Mapping[str, Any]


def seed_means(metric: str, records: Sequence[Record], comparable: bool = True) -> dict[str, Any]:
    """Means and deviations over seeds, for results.json; empty without several seeds.

    `settings` has a record for each combination of the other values that was scored with every seed: its
    scores by column, each the mean with `stderr`, the deviation over seeds. `best` is the setting with the
    best mean, and the mean of the scores of a choice that is made for each seed by the other seeds, which
    does not bias it.

    Args:
        metric: the score by which settings are compared.
        records: the points of the sweep.
        comparable: whether the scores of all points are on one scale; otherwise there is no best setting.
    """
    groups = dict[str, dict[Any, Record]]()
    for record in records:
        if SEED not in record["values"]:
            return {}
        others = {key: value for key, value in record["values"].items() if key != SEED}
        groups.setdefault(json.dumps(others, sort_keys=True), {})[record["values"][SEED]] = record
    seeds = sorted({record["values"][SEED] for record in records})
    complete = [group for group in groups.values() if len(group) == len(seeds)]
    if len(seeds) < 2 or not complete:
        return {}
    names = short_names([key for record in records for key in record["values"] if key != SEED])
    settings = [_setting(metric, [group[seed] for seed in seeds], names) for group in complete]
    means: dict[str, Any] = {"seeds": seeds, "settings": settings}
    if not comparable:
        return means
    sign = 1 if metric in LOWER_IS_BETTER else -1
    best = min(settings, key=lambda setting: sign * setting["scores"][metric]["value"])
    values = [_chosen_by_others(metric, complete, seed, sign) for seed in seeds]
    means["best"] = {
        "setting": best["setting"],
        "of_settings": len(settings),
        "value": fmean(values),
        "stderr": stdev(values),
    }
    return means


def mean_columns(metric: str, records: Sequence[Record]) -> list[Column]:
    """The columns that have a mean, without that of the metric."""
    return [
        column
        for column in columns_of(records)
        if column.key not in NOT_A_MEAN and column_key(column) != metric
    ]


def column_key(column: Column) -> str:
    """Key of a column in the scores of a setting."""
    return f"{column.extractor}/{column.key}" if column.extractor else column.key


def _setting(metric: str, group: Sequence[Record], names: Mapping[str, str]) -> dict[str, Any]:
    values = {key: value for key, value in group[0]["values"].items() if key != SEED}
    scores = {metric: _mean([record[metric] for record in group])}
    for column in mean_columns(metric, group):
        each = [column.record(record) for record in group]
        if all(record is not None for record in each):
            scores[column_key(column)] = _mean([record for record in each if record is not None])
    return {"setting": title_of(values, names), "values": values, "scores": scores}


def _mean(scores: Sequence[Record]) -> dict[str, float]:
    values = [score.get("value", score.get("mean")) for score in scores]
    return {"value": fmean(values), "stderr": stdev(values)}


def _chosen_by_others(metric: str, groups: Sequence[Mapping[Any, Record]], seed: Any, sign: int) -> float:
    """The score at a seed of the setting that is best over the other seeds."""

    def over_others(group: Mapping[Any, Record]) -> float:
        return sign * fmean(record[metric]["value"] for other, record in group.items() if other != seed)

    return min(groups, key=over_others)[seed][metric]["value"]
