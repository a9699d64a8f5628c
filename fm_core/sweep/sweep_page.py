"""The page and the figure of a sweep, from its results."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fm_core.report.drawing import Drawing
from fm_core.report.html import Figure, PageSection, Table, page
from fm_core.report.plots import sweep_lines
from fm_core.report.score_columns import columns_of
from fm_core.report.score_text import error_notes, with_error
from fm_core.sweep.seed_means import column_key, mean_columns
from fm_core.sweep.sweep_points import short_names, value_text
from fm_core.sweep.sweep_results import check_text, digits_of

NOT_LISTED = ("frechet_limit", "classifier")
PAIRED = "paired"
Results = Mapping[str, Any]


def sweep_page(results: Results) -> str:
    """The page, self-contained."""
    return page(f"Sweep of {results['run']}", results["summary"], sweep_sections(results))


def sweep_sections(results: Results) -> list[PageSection]:
    """The best point, the table of all points, the figure, and the points that failed."""
    sections = [_best_section(results)] if "best" in results else []
    if "over_seeds" in results:
        sections.append(_seed_section(results))
    sections.append(PageSection("Points", [_table(results)], _note(results)))
    caption = f"{results['title']} of each point ± its standard error"
    figure = Figure(sweep_figure(results), caption)
    sections.append(PageSection("Figure", [figure]))
    if results["failed"]:
        rows = [[title, error] for title, error in results["failed"].items()]
        sections.append(PageSection("Points that failed", [Table(["point", "error"], rows)]))
    return sections


def sweep_figure(results: Results) -> Drawing:
    """The figure: the score against the axis with the most values, a line for each combination."""
    records: Sequence[Results] = results["points"]
    names = _names(results)
    distinct = {key: _distinct(records, key) for key in names}
    # Of axes with equally many values, one with numbers.
    axis = (
        max(distinct, key=lambda key: (len(distinct[key]), all(map(_is_number, distinct[key]))))
        if names
        else ""
    )
    values = distinct.get(axis, [])
    numbers = all(map(_is_number, values))
    values = sorted(values) if numbers else values
    places = {value_text(value): float(value if numbers else at) for at, value in enumerate(values)}
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for record in records:
        place = places[value_text(record["values"].get(axis))]
        others = [key for key in names if key != axis and len(distinct[key]) > 1]
        label = ", ".join(f"{names[key]} {value_text(record['values'].get(key))}" for key in others)
        score = record[results["metric"]]
        lines.setdefault(label, []).append((place, score["value"], score.get("stderr", 0.0)))
    fresh = None
    if record := results.get("best", {}).get("fresh"):
        best = next(each for each in records if each["number"] == results["best"]["number"])
        place = places[value_text(best["values"].get(axis))]
        fresh = (place, record["value"], record.get("stderr", 0.0)) if "change" in record else None
    ticks = {place: text for text, place in places.items()}
    return sweep_lines(lines, names.get(axis, ""), results["title"], ticks, fresh)


def _names(results: Results) -> dict[str, str]:
    """The short name of every key that a point sets."""
    return short_names([key for record in results["points"] for key in record["values"]])


def _distinct(records: Sequence[Results], key: str) -> list[Any]:
    values: list[Any] = []
    for record in records:
        value = record["values"].get(key)
        values += [value] if value not in values else []
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _best_section(results: Results) -> PageSection:
    best, digits = results["best"], digits_of(results["metric"])
    record = next(each for each in results["points"] if each["number"] == best["number"])
    chosen = record[results["metric"]]
    rows = [
        ["point", best["point"]],
        [f"{results['title']} in the sweep", f"{with_error(chosen, digits)} ({chosen['images']:,} images)"],
    ]
    if "fresh" in best:
        rows.append(["on fresh samples", check_text(results)])
    others = best["not_distinguishable"]
    rows.append(["not distinguishable from it", "; ".join(others) or "none"])
    note = (
        f"Chosen among {best['of_points']} points. The lowest of several values is too low on average, and "
        "the highest too high, so the value on fresh samples is the one to report. Points are listed as not "
        "distinguishable if their difference is within the error at a level of "
        f"{best['level']:.0%} for all comparisons together. No error covers another training."
    )
    return PageSection("Best point", [Table(["", ""], rows)], note)


def _seed_section(results: Results) -> PageSection:
    """The means over seeds."""
    means, metric = results["over_seeds"], results["metric"]
    digits = digits_of(metric)
    columns = [
        column
        for column in mean_columns(metric, results["points"])
        if any(column_key(column) in setting["scores"] for setting in means["settings"])
    ]
    rows = [
        [
            setting["setting"],
            with_error(setting["scores"][metric], digits),
            *(
                with_error(setting["scores"][column_key(column)], column.digits)
                if column_key(column) in setting["scores"]
                else ""
                for column in columns
            ),
        ]
        for setting in means["settings"]
    ]
    seeds = ", ".join(map(str, means["seeds"]))
    note = f"Means over the seeds {seeds} of training; ± is the deviation over seeds."
    if best := means.get("best"):
        note += (
            f" Best mean of {best['of_settings']} settings: {best['setting']}. A choice for each seed by the "
            f"other seeds has {results['title']} {with_error(best, digits)}, which the choice does not bias."
        )
    head = ["setting", results["title"], *(column.head(results["points"]) for column in columns)]
    return PageSection("Over seeds", [Table(head, rows)], note)


def _table(results: Results) -> Table:
    records: Sequence[Results] = results["points"]
    names, metric = _names(results), results["metric"]
    digits = digits_of(metric)
    columns = [
        column
        for column in columns_of(records)
        if column.key not in (metric, *NOT_LISTED) and any(column.cell(record) for record in records)
    ]
    runs = len({record["run"] for record in records}) > 1
    head = [*names.values(), *(["run"] if runs else []), results["title"], "difference from the best", ""]
    rows: list[list[str]] = []
    for record in records:
        row = [value_text(record["values"][key]) if key in record["values"] else "" for key in names]
        row += [record["run"]] if runs else []
        row.append(f"{with_error(record[metric], digits)} ({record[metric]['images']:,})")
        row += [_difference(record, digits), record.get("verdict", "")]
        rows.append([*row, *(column.cell(record) for column in columns)])
    return Table([*head, *(column.title for column in columns)], rows)


def _difference(record: Results, digits: int) -> str:
    difference = cast(Results | None, record.get("difference"))
    if difference is None:
        return ""
    sign = "+" if difference["value"] > 0 else ""
    return f"{sign}{with_error(difference, digits)}, {PAIRED if difference['paired'] else 'unpaired'}"


def _note(results: Results) -> str:
    notes = error_notes((results["title"], record[results["metric"]]) for record in results["points"])
    pairing = (
        "Samples of all points, or with several values of run.seed of all points of one of them, start from "
        "the same noise. The error of a paired difference takes this into "
        "account, and is small if two points make similar images; an unpaired one adds both errors as if "
        "they were independent."
    )
    return " ".join([pairing, *notes])
