"""The figures of a comparison on images: curves, scores with errors, trajectories and samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fm_core.report.drawing import Drawing, count_axis, new_axes, plain_log_axis, plain_text, styled
from fm_core.report.gallery import STRIP_SIDE, Gallery
from fm_core.report.gallery_encoding import gallery
from fm_core.report.html import Figure
from fm_core.report.plots import ErrorBar, error_bar_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Any]
TRAJECTORY_COLUMNS = 9
"""Number of times of a trajectory that are shown, including the first and the last."""
TRAJECTORIES = 3
"""Number of images whose trajectories are shown."""
SOLVERS = ("euler", "midpoint", "heun2", "rk4", "dopri5")
TRAJECTORIES_BUDGET, SAMPLES_BUDGET = 700_000, 1_300_000
"""Maximum number of bytes of all trajectories, and of the samples of all objectives, in a page."""


@dataclass(frozen=True)
class Curve:
    """Values with their standard errors against a cost."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    stderr: Sequence[float] | None = None


def score_error_bars(summary: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The scores of all objectives with their errors, one plot per score that at least two of them have."""
    figures = list[Figure]()
    for key, title in (
        ("frechet_distance", "Fréchet distance"),
        ("bits_per_dim", "bits/dim, K = 1"),
        ("bits_per_dim_k_sample", "bits/dim of K draws"),
    ):
        rows = [
            ErrorBar(row["title"], row[key]["value"], row[key]["stderr"]) for row in summary if key in row
        ]
        if len(rows) > 1:
            drawing = error_bar_plot(title, rows, from_zero=not key.startswith("bits"))
            figures.append(Figure(drawing, f"{title}, lower is better; bars as ± in the table."))
    return figures


def training_figures(results: Results) -> list[Figure]:
    """The paper's figures 5 and 10: distance and NFE of the samples against images seen."""
    titles, training = _titles(results), results["curves"]["while_training"]
    distances = [
        Curve(
            titles[name],
            [point["images_seen"] for point in points],
            [point["value"] for point in points],
            [point["stderr"] for point in points],
        )
        for name, points in training.items()
    ]
    evaluations = [
        Curve(titles[name], [point["images_seen"] for point in points], [point["nfe"] for point in points])
        for name, points in training.items()
    ]
    return [
        Figure(
            against_images(distances, "Fréchet distance", log=True),
            "Distance of samples at each checkpoint, with its standard error (the paper's figure 5).",
        ),
        Figure(against_images(evaluations, "NFE"), "NFE of the samples (the paper's figure 10)."),
    ]


def solver_figures(results: Results) -> list[Figure]:
    """The paper's figure 7: error against the exact solution, and distance, for each solver."""
    titles, solvers = _titles(results), results["curves"]["solvers"]
    figures = list[Figure]()
    for solver in (name for name in SOLVERS if solvers.get(name)):
        errors = [
            Curve(titles[name], [point["nfe"] for point in points], [point["error"] for point in points])
            for name, points in solvers[solver].items()
        ]
        distances = [
            Curve(
                titles[name],
                [point["nfe"] for point in points],
                [point["value"] for point in points],
                [point["stderr"] for point in points],
            )
            for name, points in solvers[solver].items()
        ]
        caption = (
            f"Solver {solver}. Above: root mean square difference from a reference solution, "
            "with many evaluations and from the same noise. Below: Fréchet distance."
        )
        figures.append(Figure(against_evaluations(solver, errors, distances), caption))
    return figures


def trajectory_galleries(trajectories: Mapping[str, Tensor], levels: int, count: int) -> list[Gallery]:
    """The paper's figure 6: trajectories from the same noise to data, one row for each objective's model.

    Args:
        trajectories: uint8 [T, n, C, H, W] of `levels` intensity levels, by objective.
        levels: number of intensity levels.
        count: number of images, at most n.
    """
    times = torch.linspace(0, len(next(iter(trajectories.values()))) - 1, TRAJECTORY_COLUMNS).round().long()
    galleries = list[Gallery]()
    for number in range(count):
        units = torch.stack([trajectory[times, number] for trajectory in trajectories.values()])
        caption = f"The noise of image {number}, at equally spaced times from t = 0 (left) to t = 1 (right)"
        titles = list(trajectories)
        galleries.append(
            gallery(
                units,
                levels,
                titles,
                caption,
                budget=TRAJECTORIES_BUDGET // count,
                labels=titles,
                least=STRIP_SIDE,
                sequence=True,
            )
        )
    return galleries


def sample_galleries(images: Mapping[str, Mapping[str, Tensor]], evaluations: Sequence[int]) -> list[Gallery]:
    """The paper's figures 16 and 17: samples with few evaluations, one row for each number of them.

    Args:
        images: `images` uint8 [budgets, n, C, H, W] and `levels`, by objective.
        evaluations: number of evaluations of each budget.
    """
    labels = [f"{count} evaluations" for count in evaluations]
    return [
        gallery(
            tensors["images"],
            int(tensors["levels"]),
            [f"{title}, {label}" for label in labels],
            f"{title}: one row each for {', '.join(map(str, evaluations))} evaluations (midpoint)",
            budget=SAMPLES_BUDGET // len(images),
            labels=labels,
            least=STRIP_SIDE,
        )
        for title, tensors in images.items()
    ]


@styled
def against_images(curves: Sequence[Curve], title: str, *, log: bool = False) -> Drawing:
    """Draw values against images seen, one line per objective."""
    figure, (axes,) = new_axes()
    _plot(axes, curves, "images seen", title, log=log)
    count_axis(axes.xaxis)
    _legend_below(figure, axes)
    return Drawing(figure)


@styled
def against_evaluations(solver: str, errors: Sequence[Curve], distances: Sequence[Curve]) -> Drawing:
    """Draw errors (above) and distances (below) against NFE, one line per objective."""
    figure, panels = new_axes(rows=2, size=(4.4, 2.5))
    for axes, curves, title in zip(
        panels, (errors, distances), ("RMS error", "Fréchet distance"), strict=True
    ):
        _plot(axes, curves, "NFE" if axes is panels[-1] else "", title, log=True)
        axes.set_xscale("log")
        plain_log_axis(axes.xaxis)
    panels[0].set_title(solver, loc="left")
    _legend_below(figure, panels[0])
    return Drawing(figure)


def _titles(results: Results) -> dict[str, str]:
    return {name: row["title"] for name, row in results["summary"].items()}


def _plot(axes: "Axes", curves: Sequence[Curve], x: str, y: str, *, log: bool) -> None:
    for curve in curves:
        label = plain_text(curve.label)
        (artist,) = axes.plot(curve.x, curve.y, marker=".", linewidth=1.4, label=label)
        if curve.stderr:
            low = [max(value - error, 1e-12) for value, error in zip(curve.y, curve.stderr, strict=True)]
            high = [value + error for value, error in zip(curve.y, curve.stderr, strict=True)]
            axes.fill_between(curve.x, low, high, color=artist.get_color(), alpha=0.18, linewidth=0)
    if log:
        axes.set_yscale("log")
        plain_log_axis(axes.yaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True)


def _legend_below(figure: Any, axes: "Axes") -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=1.4)
