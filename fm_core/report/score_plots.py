"""Scores of one or several sets of samples, drawn with their standard errors."""

from collections.abc import Mapping, Sequence
from typing import Any

from fm_core.report.html import Figure
from fm_core.report.plots import ErrorBar, error_bar_plot, nfe_curves
from fm_core.report.score_columns import LIMIT, columns_of
from fm_core.report.score_text import distance_title, further_scores, score_record

Scores = Mapping[str, Any]
SAMPLES_ERROR = "Bars are one standard error"
SINGLE = (
    ("spatial_frechet_distance", "sFID"),
    ("kernel_distance", "kernel distance"),
    ("inception_score", "Inception Score"),
    ("classifier_score", "classifier score"),
)
"""Scores that are drawn alone, because no other score has their unit."""
MAX_ROWS = 40
"""Maximum number of rows of a plot."""


def score_figures(scores: Scores) -> list[Figure]:
    """Draw the scores of one set of samples, one plot per unit; scores without an error are left out."""
    figures = [
        figure for own in (scores, *further_scores(scores).values()) for figure in _feature_figures(own)
    ]
    bits = [
        _error_bar(f"K = {record['k']}", record)
        for key in ("bits_per_dim", "bits_per_dim_k_sample")
        if (record := score_record(scores, key)) and "stderr" in record
    ]
    if bits:
        caption = f"Bits/dim of validation images, lower is better. {SAMPLES_ERROR}."
        figures.append(Figure(error_bar_plot("bits/dim", bits, from_zero=False), caption))
    return figures


def _feature_figures(scores: Scores) -> list[Figure]:
    """The scores of one extractor."""
    figures = list[Figure]()
    distances = [
        _error_bar(f"{what} ({scores[key]['images']:,})", scores[key])
        for key, what in (
            ("frechet_distance", "samples"),
            ("frechet_distance_of_as_many", "samples"),
            ("frechet_distance_of_held_out", "validation images"),
        )
        if "stderr" in scores.get(key, {})
    ]
    if distances:
        title = distance_title(scores["frechet_distance"]["features"])
        caption = f"{title}, lower is better. {SAMPLES_ERROR}; in parentheses, the number of images."
        figures.append(Figure(error_bar_plot(title, distances), caption))
    shares = [
        _error_bar(key, scores[key]) for key in ("precision", "recall") if "stderr" in scores.get(key, {})
    ]
    if shares:
        caption = f"Precision and recall, higher is better. {SAMPLES_ERROR}."
        figures.append(Figure(error_bar_plot("precision and recall", shares), caption))
    for key, title in SINGLE:
        record = score_record(scores, key)
        if record and "stderr" in record:
            figures.append(
                Figure(error_bar_plot(title, [_error_bar("samples", record)]), f"{title}. {SAMPLES_ERROR}.")
            )
    return figures


def comparison_figures(rows: Sequence[tuple[str, Scores]]) -> list[Figure]:
    """Draw each score of several sets of samples that at least two of them have.

    `rows` are name and scores of each set of samples; of many, the last MAX_ROWS are drawn.
    """
    figures = list[Figure]()
    every = [scores for _, scores in rows]
    for column in columns_of(every):
        bars = [
            _error_bar(name, record)
            for name, scores in rows[-MAX_ROWS:]
            if (record := column.record(scores)) and "stderr" in record
        ]
        if len(bars) > 1 and column.key not in (LIMIT, "classifier"):
            title = column.head(every)
            drawing = error_bar_plot(title, bars, from_zero=not column.key.startswith("bits_per_dim"))
            figures.append(Figure(drawing, f"{title}. {SAMPLES_ERROR}."))
    return figures


def nfe_figures(curve: Mapping[str, Any]) -> list[Figure]:
    """Draw the error and the distance of samples with few evaluations, from the record `nfe_curve`."""
    by_solver = dict[str, list[Mapping[str, Any]]]()
    for point in curve["points"]:
        by_solver.setdefault(point["solver"], []).append(point)
    lines = {
        solver: {
            "nfe": [point["nfe"] for point in points],
            "error": [point["error"] for point in points],
            "distance": [point["frechet_distance"] for point in points],
        }
        for solver, points in by_solver.items()
    }
    title = distance_title(curve["features"])
    exact = f"a reference solution with {curve['exact']['evaluations']:,} evaluations"
    return [
        Figure(
            nfe_curves(lines, "error", "error (RMS)"),
            f"{curve['images']:,} images: difference from {exact}, against evaluations of the network",
        ),
        Figure(
            nfe_curves(lines, "distance", title),
            f"{curve['images']:,} images: {title}, against evaluations of the network",
        ),
    ]


def _error_bar(label: str, record: Mapping[str, Any]) -> ErrorBar:
    return ErrorBar(label, record.get("value", record.get("mean", 0.0)), record["stderr"])
