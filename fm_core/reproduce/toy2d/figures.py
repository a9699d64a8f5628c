"""The paper's 2-D figures (figures 2, 3, 4, 8 and 9).

Arrows, trajectories and densities are drawn as pixels also in an SVG, where they would take megabytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from fm_core.method.paths import Path
from fm_core.report.drawing import INK, MUTED, Drawing, plain_text, styled
from fm_core.reproduce.toy2d.checkerboard import ENTROPY, WINDOW, grid_centers, on_squares

BINS = 40
"""Bins of a histogram along each axis: eight per square of the board."""
PEAK = 2.0
"""Brightest value of all densities and histograms, in multiples of the data's density on its squares."""
DENSITY = math.exp(-ENTROPY)
"""Density of the data on its squares."""
SNAPSHOTS = 5
"""Number of times at which a model's distribution is shown."""
LINES = 160
"""Number of trajectories that are drawn."""


@dataclass(frozen=True)
class FigureData:
    """The tensors of one complete experiment from which figures are made."""

    label: str
    tensors: Mapping[str, Tensor]
    """times [T], trajectory [T, S, 2], samples-<nfe> [S, 2], density [G, G]."""


@styled
def conditional_fields(paths: Mapping[str, Path], scored: Sequence[str]) -> Drawing:
    """Figures 2 and 8: the conditional score and the conditional velocity of one data point, over time.

    Args:
        paths: name -> path; each gets a row with its velocity.
        scored: names of the paths that also get a row with their score, above the velocity.
    """
    rows = [
        (name, kind) for name in paths for kind in ("score", "velocity") if kind != "score" or name in scored
    ]
    times = (0.0, 1 / 3, 2 / 3, 0.95)
    figure, axes = _panels(len(rows), len(times), 2.05, extra_width=1.5)
    axis = torch.linspace(-1.8, 1.8, 13)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points, x1 = torch.stack([x, y], dim=-1).reshape(-1, 2), torch.tensor([0.8, 0.8])
    for row, (name, kind) in enumerate(rows):
        fields = [conditional_field(paths[name], kind, points, x1, t) for t in times]
        lengths = torch.stack(fields).norm(dim=-1).clamp_min(1e-3)
        norm = LogNorm(float(lengths.min()), float(lengths.max()))
        for column, (t, field) in enumerate(zip(times, fields, strict=True)):
            panel = axes[row][column]
            arrows = field / field.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            values = [v.numpy() for v in (x, y, arrows[:, 0], arrows[:, 1], lengths[column])]
            panel.quiver(
                *values, norm=norm, cmap="turbo_r", pivot="mid", scale=15, width=0.012, rasterized=True
            )
            panel.plot(*x1.tolist(), "*", color=INK, markersize=7)
            _frame(panel, 2.0)
            if row == 0:
                panel.set_title(f"t = {t:.2f}", fontsize=10)
        axes[row][0].set_ylabel(f"{name}\n{kind}", fontsize=9)
        bar = figure.colorbar(ScalarMappable(norm, "turbo_r"), ax=list(axes[row]), shrink=0.85, pad=0.015)
        bar.set_label(f"length of the {kind}", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return Drawing(figure)


@styled
def conditional_trajectories(paths: Mapping[str, Path]) -> Drawing:
    """Figure 3: trajectories from noise to one data point, psi_t(x0) = alpha_t x1 + sigma_t x0."""
    figure, axes = _panels(1, len(paths), 3.4)
    x0 = torch.randn(24, 2, generator=torch.Generator().manual_seed(3))
    x1 = torch.tensor([1.6, 1.2])
    for panel, (name, path) in zip(axes[0], paths.items(), strict=True):
        start, end = path.interval
        t = torch.linspace(start, end, 101)
        lines = path.alpha(t)[:, None, None] * x1 + path.sigma(t)[:, None, None] * x0
        _colored_lines(panel, lines, linewidth=1.3)
        panel.plot(*lines[0].T.numpy(), ".", color=MUTED, markersize=4)
        panel.plot(*x1.tolist(), "*", color=INK, markersize=10, zorder=5)
        panel.set_title(name, fontsize=10)
        _frame(panel, float(lines.abs().max()) * 1.05)
    _time_bar(figure, list(axes[0]))
    return Drawing(figure)


@styled
def samples_over_time_and_budget(experiments: Sequence[FigureData], budgets: Sequence[int]) -> Drawing:
    """Figures 4 and 9: the model's distribution over time (left), samples with few evaluations (right)."""
    times = experiments[0].tensors["times"]
    chosen = [round(i * (len(times) - 1) / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)]
    times = times[chosen]
    count = len(times) + len(budgets)
    figure, axes = _panels(
        len(experiments), count, 1.28, extra_width=2.4, extra_height=-0.1, gap_after=len(times)
    )
    for row, experiment in enumerate(experiments):
        snapshots = [experiment.tensors["trajectory"][i] for i in chosen]
        few = [experiment.tensors[f"samples-{nfe}"] for nfe in budgets]
        for column, points in enumerate([*snapshots, *few]):
            _density_image(axes[row][column], histogram(points))
        axes[row][0].set_ylabel(
            _wrap_label(experiment.label), fontsize=9, rotation=0, ha="right", va="center"
        )
    for column in range(count):
        budget = column - len(times)
        title = f"NFE = {budgets[budget]}" if budget >= 0 else f"t = {float(times[column]):.2f}"
        axes[0][column].set_title(title, fontsize=10)
    _density_bar(figure, [panel for line in axes for panel in line])
    return Drawing(figure)


@styled
def lines_and_densities(experiments: Sequence[FigureData]) -> Drawing:
    """Trajectories from the same noise for every experiment, with the model densities below."""
    figure, axes = _panels(2, len(experiments) + 1, 1.75, extra_width=0.8, extra_height=0.75)
    for column, experiment in enumerate(experiments):
        lines = experiment.tensors["trajectory"][:, :LINES]
        _colored_lines(axes[0][column], lines, linewidth=0.6)
        axes[0][column].plot(*lines[-1].T.numpy(), ".", color=INK, markersize=1.6)
        _frame(axes[0][column], WINDOW)
        axes[0][column].set_title(_wrap_label(experiment.label), fontsize=9)
        _density_image(axes[1][column], experiment.tensors["density"])
    axes[0][-1].axis("off")
    _time_bar(figure, list(axes[0]))
    board = on_squares(torch.stack(grid_centers(200), dim=-1).reshape(-1, 2)).view(200, 200)
    _density_image(axes[1][-1], board * DENSITY)
    axes[1][-1].set_title("the data", fontsize=9)
    axes[0][0].set_ylabel("trajectories", fontsize=9)
    axes[1][0].set_ylabel("density", fontsize=9)
    _density_bar(figure, list(axes[1]))
    return Drawing(figure)


def histogram(points: Tensor) -> Tensor:
    """Histogram density of points [S, 2], [BINS, BINS], rows are y; S includes points outside the window."""
    edges = np.linspace(-WINDOW, WINDOW, BINS + 1)
    counts, _, _ = np.histogram2d(points[:, 1].numpy(), points[:, 0].numpy(), bins=[edges, edges])
    return torch.from_numpy(counts / (len(points) * (2 * WINDOW / BINS) ** 2))


def conditional_field(path: Path, kind: str, x: Tensor, x1: Tensor, t: float) -> Tensor:
    """The score grad log p_t(x | x1) or u_t(x | x1) at x [N, 2], where x = alpha_t x1 + sigma_t x0."""
    time = torch.full((len(x),), t, dtype=torch.float64)
    alpha, sigma = path.alpha(time)[:, None], path.sigma(time)[:, None]
    x0 = (x - alpha * x1) / sigma
    if kind == "score":
        return -x0 / sigma
    return path.sample(x0, x1.expand_as(x0).double(), time).velocity


def _panels(
    rows: int,
    columns: int,
    size: float,
    extra_width: float = 0.6,
    extra_height: float = 0.45,
    gap_after: int | None = None,
) -> tuple[Figure, list[list[Axes]]]:
    """A grid of `rows` by `columns` square panels; a blank strip follows column number `gap_after`."""
    figure = Figure(figsize=(columns * size + extra_width, rows * size + extra_height), layout="constrained")
    FigureCanvasAgg(figure)
    widths = [1.0] * columns
    if gap_after is not None:
        widths.insert(gap_after, 0.12)
    grid = figure.add_gridspec(rows, len(widths), width_ratios=widths)
    panels = [column for column in range(len(widths)) if gap_after is None or column != gap_after]
    return figure, [[figure.add_subplot(grid[row, column]) for column in panels] for row in range(rows)]


def _frame(panel: Axes, half: float) -> None:
    panel.spines[["top", "right"]].set_visible(True)
    panel.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])


def _colored_lines(panel: Axes, lines: Tensor, linewidth: float) -> None:
    """Lines [T, N, 2] colored by time from blue (noise) to red (data)."""
    pieces = torch.stack([lines[:-1], lines[1:]], dim=2).flatten(0, 1).numpy()
    colors = np.repeat(np.linspace(0, 1, len(lines) - 1), lines.shape[1])
    collection = LineCollection(list(pieces), array=colors, cmap="coolwarm", linewidth=linewidth)
    collection.set_rasterized(True)
    panel.add_collection(collection)


def _density_image(panel: Axes, density: Tensor) -> None:
    extent = (-WINDOW, WINDOW, -WINDOW, WINDOW)
    _frame(panel, WINDOW)
    panel.imshow(density.numpy() / DENSITY, origin="lower", extent=extent, vmin=0, vmax=PEAK, cmap="viridis")


def _density_bar(figure: Figure, panels: list[Axes]) -> None:
    image = ScalarMappable(Normalize(0, PEAK), "viridis")
    bar = figure.colorbar(image, ax=panels, shrink=0.6, pad=0.01, extend="max")
    bar.set_label("density / data's density", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _time_bar(figure: Figure, panels: list[Axes]) -> None:
    bar = figure.colorbar(ScalarMappable(cmap="coolwarm"), ax=panels, shrink=0.7, pad=0.01, ticks=[0, 1])
    bar.ax.set_yticklabels(["noise", "data"], fontsize=8)


def _wrap_label(label: str) -> str:
    return plain_text(label).replace(" (", "\n(")
