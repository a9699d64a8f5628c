"""Curves of a run as PNG files: training loss, distance during training, and scores against NFE."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_curve(metrics: list[dict[str, Any]]) -> bytes:
    """Plot training loss, overall and by quarter of t, against images seen.

    `metrics` are the lines of train/metrics.jsonl, at least one.
    """
    figure, (axes,) = _figure((7.2, 3.2))
    _against_images_seen(axes, "loss per dimension")
    seen = [line["images_seen"] for line in metrics]
    for quarter in range(4):
        values = [line["loss_by_quarter_of_t"][quarter] for line in metrics]
        axes.plot(seen, values, linewidth=0.9, alpha=0.6, label=f"t in quarter {quarter + 1}")
    axes.plot(seen, [line["loss"] for line in metrics], color="black", linewidth=1.6, label="all t")
    axes.legend(fontsize=7, ncols=5, loc="upper right")
    return figure_png(figure)


def distance_curve(scores: list[dict[str, Any]]) -> bytes:
    """Plot Fréchet distance with its standard error against images seen.

    `scores` are the lines of evaluation/beside.jsonl, at least one.
    """
    figure, (axes,) = _figure((7.2, 3.2))
    _against_images_seen(axes, f"Fréchet distance ({scores[-1]['features']} features)")
    seen = [line["images_seen"] for line in scores]
    distances = [line["frechet_distance"] for line in scores]
    axes.errorbar(seen, distances, [line["stderr"] for line in scores], color="black", marker="o", capsize=3)
    return figure_png(figure)


def nfe_curves(lines: Mapping[str, Mapping[str, Sequence[float]]], distance: str) -> bytes:
    """Plot error and distance against NFE, with one line for each solver.

    `lines` contains `nfe`, `error` and `distance` for each solver; `distance` is the title of the distances.
    """
    figure, panels = _figure((9.2, 3.2), columns=2)
    for axes, key, title in zip(
        panels, ("error", "distance"), ("error of the solution (RMS)", distance), strict=True
    ):
        for solver, line in lines.items():
            order = sorted(range(len(line["nfe"])), key=line["nfe"].__getitem__)
            axes.plot(
                [line["nfe"][i] for i in order],
                [line[key][i] for i in order],
                marker="o",
                markersize=3,
                label=solver,
            )
        axes.set_xscale("log")
        if all(value > 0 for line in lines.values() for value in line[key]):
            axes.set_yscale("log")
        axes.set_xlabel("evaluations of the network")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    return figure_png(figure)


def sweep_lines(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    axis: str,
    score: str,
    ticks: Mapping[float, str],
    fresh: tuple[float, float, float] | None = None,
) -> bytes:
    """Plot a score with its standard errors against the values of one axis of a sweep.

    Args:
        lines: (position, score, standard error) of the points of each combination of the other axes.
        axis: title of the axis.
        score: title of the score.
        ticks: text at each position.
        fresh: position, score and standard error of the best point on fresh samples.
    """
    figure, (axes,) = _figure((7.2, 3.8))
    positions = sorted(ticks)
    gap = min((b - a for a, b in pairwise(positions)), default=1.0)
    for number, (label, points) in enumerate(lines.items()):
        # Beside each other, so that error bars do not hide each other.
        shift = 0.08 * gap * (number - (len(lines) - 1) / 2) / max(1, len(lines) - 1)
        x, y, errors = ([point[part] for point in sorted(points)] for part in range(3))
        axes.errorbar(
            [each + shift for each in x], y, errors, marker="o", markersize=4, capsize=3, label=label
        )
    if fresh:
        x, y, error = fresh
        axes.errorbar(
            [x],
            [y],
            [error],
            color="black",
            marker="*",
            markersize=11,
            capsize=4,
            label="best, fresh samples",
        )
    axes.set_xticks(positions, [ticks[position] for position in positions])
    axes.set_xlabel(axis)
    axes.set_ylabel(score)
    axes.grid(alpha=0.3)
    if any(lines) or fresh:
        axes.legend(fontsize=7)
    return figure_png(figure)


def _figure(size: tuple[float, float], columns: int = 1) -> "tuple[Figure, list[Axes]]":
    # matplotlib is imported only when something is drawn, which `fm compare` does not do.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, number + 1) for number in range(columns)]


def _against_images_seen(axes: "Axes", label: str) -> None:
    axes.set_xlabel("images seen")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def figure_png(figure: "Figure") -> bytes:
    """Render a matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
