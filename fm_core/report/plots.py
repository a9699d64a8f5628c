"""Plots of a run: loss and distance during training, scores with their errors, and scores against NFE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fm_core.report.drawing import (
    INK,
    SERIES,
    Drawing,
    count_axis,
    new_axes,
    plain_log_axis,
    plain_text,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 400
"""Maximum number of points of a line; more are averaged, so that pages of long runs are not larger."""
LONGEST_LABEL = 34


@dataclass(frozen=True)
class ErrorBar:
    """A value with its standard error, one row of a plot of scores."""

    label: str
    value: float
    stderr: float


@styled
def loss_curve(metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]] = ()) -> Drawing:
    """Plot training loss, overall and by quarter of t, and validation loss against images seen.

    Args:
        metrics: lines of train/metrics.jsonl, at least one.
        validation: lines of train/held_out.jsonl; without any, there is no line of the validation loss.
    """
    figure, (axes,) = new_axes()
    _against_images_seen(axes, "loss per dimension")
    lines = averaged(metrics)
    seen = [line["images_seen"] for line in lines]
    for quarter in range(4):
        values = [line["loss_by_quarter_of_t"][quarter] for line in lines]
        axes.plot(seen, _gaps(values), linewidth=0.9, alpha=0.75, label=f"t in quarter {quarter + 1}")
    axes.plot(seen, _gaps([line["loss"] for line in lines]), color=INK, linewidth=1.8, label="all t")
    points = [line for line in validation if line["loss"] is not None]
    if points:
        axes.plot(
            [line["images_seen"] for line in points],
            [line["loss"] for line in points],
            color=SERIES[4],
            linestyle="--",
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            label="validation",
        )
    _legend_below(figure, axes)
    return Drawing(figure)


@styled
def distance_curve(scores: Sequence[Mapping[str, Any]]) -> Drawing:
    """Plot Fréchet distance with its standard error against images seen.

    `scores` are the lines of evaluation/beside.jsonl, at least one.
    """
    figure, (axes,) = new_axes()
    _against_images_seen(axes, plain_text(f"Fréchet distance ({scores[-1]['features']} features)"))
    seen = [line["images_seen"] for line in scores]
    values = [line["frechet_distance"] for line in scores]
    errors = [line["stderr"] for line in scores]
    axes.errorbar(seen, values, errors, marker="o", markersize=4, capsize=3, linewidth=1.3)
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        plain_log_axis(axes.yaxis)
    return Drawing(figure)


@styled
def error_bar_plot(title: str, bars: Sequence[ErrorBar], *, from_zero: bool = True) -> Drawing:
    """Plot values with their standard errors, one row each, from top to bottom.

    `from_zero`: whether the axis begins at 0, as long as no value is negative.
    """
    figure, (axes,) = new_axes(size=(4.4, 0.75 + 0.28 * len(bars)))
    rows = range(len(bars), 0, -1)
    values, errors = [each.value for each in bars], [each.stderr for each in bars]
    axes.errorbar(values, rows, xerr=errors, fmt="o", markersize=5, capsize=3.5, linewidth=1.6)
    axes.set_yticks(list(rows), [plain_text(_shortened(each.label)) for each in bars])
    axes.set_ylim(0.4, len(bars) + 0.6)
    low = min(each.value - each.stderr for each in bars)
    if from_zero and low >= 0:
        axes.set_xlim(0, 1.06 * max(each.value + each.stderr for each in bars) or 1)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(plain_text(title), loc="left")
    axes.locator_params(axis="x", nbins=6)
    return Drawing(figure)


@styled
def sweep_lines(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    axis: str,
    score: str,
    ticks: Mapping[float, str],
    fresh: tuple[float, float, float] | None = None,
) -> Drawing:
    """Plot a score with its standard errors against the values of one axis of a sweep.

    Args:
        lines: (position, score, standard error) of the points of each combination of the other axes.
        axis: title of the axis.
        score: title of the score.
        ticks: text at each position.
        fresh: position, score and standard error of the best point on fresh samples.
    """
    figure, (axes,) = new_axes(size=(6.6, 3.8))
    positions = sorted(ticks)
    gap = min((b - a for a, b in pairwise(positions)), default=1.0)
    for number, (label, points) in enumerate(lines.items()):
        # Beside each other, so that error bars do not hide each other.
        shift = 0.08 * gap * (number - (len(lines) - 1) / 2) / max(1, len(lines) - 1)
        x, y, errors = ([point[part] for point in sorted(points)] for part in range(3))
        axes.errorbar(
            [each + shift for each in x],
            y,
            errors,
            marker="o",
            markersize=4,
            capsize=3,
            label=plain_text(label),
        )
    if fresh:
        x, y, error = fresh
        axes.errorbar(
            [x],
            [y],
            [error],
            color=INK,
            marker="*",
            markersize=11,
            capsize=4,
            label="best, fresh samples",
        )
    axes.set_xticks(positions, [plain_text(ticks[position]) for position in positions])
    axes.set_xlabel(plain_text(axis))
    axes.set_ylabel(plain_text(score))
    axes.grid(visible=True)
    if any(lines) or fresh:
        _legend_below(figure, axes)
    return Drawing(figure)


@styled
def nfe_curves(lines: Mapping[str, Mapping[str, Sequence[float]]], key: str, title: str) -> Drawing:
    """Plot error or distance against NFE, with one line for each solver.

    `lines` contains `nfe` and `key` for each solver; `title` is the label of the values.
    """
    figure, (axes,) = new_axes()
    for solver, line in lines.items():
        order = sorted(range(len(line["nfe"])), key=line["nfe"].__getitem__)
        x, y = [line["nfe"][i] for i in order], [line[key][i] for i in order]
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.3, label=plain_text(solver))
    axes.set_xscale("log")
    plain_log_axis(axes.xaxis)
    if all(value > 0 for line in lines.values() for value in line[key]):
        axes.set_yscale("log")
        plain_log_axis(axes.yaxis)
    axes.set_xlabel("evaluations of the network (NFE)")
    axes.set_ylabel(plain_text(title))
    axes.grid(visible=True)
    _legend_below(figure, axes)
    return Drawing(figure)


def averaged(lines: Sequence[Mapping[str, Any]], points: int = POINTS) -> list[dict[str, Any]]:
    """Average the losses of successive lines of metrics.jsonl, so that at most `points` lines are left.

    Each line gets `images_seen` of the last line of its group; values that are missing are left out.
    """
    size = -(-len(lines) // points)
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [
        {
            "images_seen": group[-1]["images_seen"],
            "loss": _mean([line["loss"] for line in group]),
            "loss_by_quarter_of_t": [
                _mean([line["loss_by_quarter_of_t"][quarter] for line in group]) for quarter in range(4)
            ],
        }
        for group in groups
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _shortened(label: str) -> str:
    """Replace the middle of a long label, because names of scores differ at the end."""
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:half]}…{label[-half:]}"


def _against_images_seen(axes: "Axes", label: str) -> None:
    axes.set_xlabel("images seen")
    axes.set_ylabel(label)
    axes.grid(visible=True)
    count_axis(axes.xaxis)


def _legend_below(figure: Any, axes: "Axes") -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        handlelength=1.4,
        columnspacing=1.2,
    )
