"""Plots of numbers against numbers."""

import io
from collections.abc import Mapping, Sequence


def curves(lines: Mapping[str, Mapping[str, Sequence[float]]], distance: str) -> bytes:
    """PNG of error and distance against NFE, a line for each solver.

    `lines` holds for each solver `nfe`, `error` and `distance`; `distance` names the latter.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, title in zip(
        figure.subplots(1, 2), ("error", "distance"), ("error of the solution (RMS)", distance), strict=True
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
