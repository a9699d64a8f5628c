"""The figures of a comparison on images, each as a PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from fm_core.report.image_grids import strip
from fm_core.report.plots import figure_png

TRAJECTORY_COLUMNS = 9
"""Number of times of a trajectory that are shown, including the first and the last."""
SOLVERS = ("euler", "midpoint", "heun2", "rk4", "dopri5")


@dataclass(frozen=True)
class Curve:
    """Values with their standard errors against a cost."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    stderr: Sequence[float] | None = None


def against_images(distances: Sequence[Curve], evaluations: Sequence[Curve]) -> bytes:
    """The paper's figures 5 and 10: distance and NFE of the samples against images seen."""
    figure, (left, right) = _panels(2)
    _plot(left, distances, "images seen", "Fréchet distance", log=True)
    _plot(right, evaluations, "images seen", "NFE")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 150k: full numbers would overlap
    return figure_png(figure)


def against_evaluations(
    errors: Mapping[str, Sequence[Curve]], distances: Mapping[str, Sequence[Curve]]
) -> bytes:
    """The paper's figure 7: error against the exact solution, and distance, by solver and objective."""
    solvers = [solver for solver in SOLVERS if distances.get(solver)]
    figure = Figure(figsize=(3.1 * len(solvers), 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for column, solver in enumerate(solvers):
        for row, (lines, name) in enumerate(((errors, "RMS error"), (distances, "Fréchet distance"))):
            axes = figure.add_subplot(2, len(solvers), row * len(solvers) + column + 1)
            _plot(
                axes, lines[solver], "NFE", name if column == 0 else "", log=True, legend=column == 0 == row
            )
            axes.set_xscale("log")
            _format_log_axis(axes.xaxis)
            axes.set_title(solver if row == 0 else "", fontsize=10)
    return figure_png(figure)


def trajectories_from_one_noise(trajectories: Mapping[str, Tensor], levels: int) -> bytes:
    """The paper's figure 6: trajectories from the same noise to data, one row for each objective's model.

    `trajectories` are images uint8 [T, C, H, W] of `levels` intensity levels, by objective.
    """
    figure = Figure(figsize=(7.6, 0.82 * len(trajectories) + 0.35), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, trajectory) in enumerate(trajectories.items()):
        axes = figure.add_subplot(len(trajectories), 1, number + 1)
        scale = max(1, 32 // trajectory.shape[-1])
        image = strip(trajectory[:, None], levels, TRAJECTORY_COLUMNS, scale)
        axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.set_frame_on(False)
    return figure_png(figure)


def _plot(
    axes: Axes, lines: Sequence[Curve], x: str, y: str, *, log: bool = False, legend: bool = True
) -> None:
    for line in lines:
        (artist,) = axes.plot(line.x, line.y, marker=".", linewidth=1.3, label=line.label)
        if line.stderr:
            low = [max(value - error, 1e-12) for value, error in zip(line.y, line.stderr, strict=True)]
            high = [value + error for value, error in zip(line.y, line.stderr, strict=True)]
            axes.fill_between(line.x, low, high, color=artist.get_color(), alpha=0.15, linewidth=0)
    if log:
        axes.set_yscale("log")
        _format_log_axis(axes.yaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="both")
    if legend:
        axes.legend(fontsize=7)


def _format_log_axis(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 times each power of ten, at most eight labels."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _panels(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * columns, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
