"""The section of a comparison's page about few evaluations: tables, verdicts and the figure."""

from collections.abc import Callable, Mapping
from typing import Any

from fm_core.report.drawing import Drawing, new_axes, plain_log_axis, plain_text, styled
from fm_core.report.html import Figure, PageSection, Table
from fm_core.report.score_text import with_error

Results = Mapping[str, Any]


def few_step_sections(results: Results) -> list[PageSection]:
    """The sections, from the content of results.json; empty if nothing was scored at few evaluations."""
    few = results.get("few_steps")
    if not few:
        return []
    titles = {name: row["title"] for name, row in results["summary"].items()}
    sections = list[PageSection]()
    if few["solvers"]:
        count = len(results["config"]["reproduce"]["few_steps"]["solvers"])
        note = (
            f"Fréchet distance of {few['images']:,} images with at most that number of evaluations, by the "
            f"best of {count} solvers and time grids for each objective. {_note_on_seeds(few)} All columns "
            "start from the same noise, in float32. The second table has the RMS difference from the exact "
            "solution of the ODE, and the share of samples that the classifier recognizes."
        )
        tables = [_distance_table(few, titles), _error_table(few, titles), *_figure(few, titles)]
        sections.append(PageSection("Few evaluations without training", tables, note))
    if few["students"]:
        students = (
            "Students start from the model of their teacher and are trained further, which the solvers "
            "above do not need. The images and their noise are the same; ± is the deviation over seeds, or "
            "with one seed the estimator's standard error."
        )
        sections.append(PageSection("Few evaluations after training", [_student_table(few)], students))
    if few["verdicts"]:
        rows = [[question, titles.get(name, name), text] for question, name, text in few["verdicts"]]
        note = (
            "Ratios of distances are means over seeds with the deviation over seeds. The teacher's distances "
            "are those of its own model, without further training."
        )
        table = Table(["question", "model", "measured"], rows)
        sections.append(PageSection("What few evaluations cost", [table], note))
    return sections


def _note_on_seeds(few: Results) -> str:
    seeds = {curve["seeds"] for curve in few["solvers"].values()}
    several = (
        "The solver is chosen for each seed by the other seeds, so that the choice does not bias the "
        "distance; the named one is the best over all seeds, and ± is the deviation over seeds."
    )
    one = (
        "The solver is chosen by these distances themselves, which are therefore too low, and ± is the "
        "estimator's standard error."
    )
    if seeds == {1}:
        return one
    return several if 1 not in seeds else f"{several} Of an objective with one seed: {one}"


def _title(name: str, few: Results, titles: Mapping[str, str]) -> str:
    seeds = few["solvers"][name]["seeds"]
    most = max(curve["seeds"] for curve in few["solvers"].values())
    return titles[name] if seeds == most else f"{titles[name]} ({seeds} of {most} seeds)"


def _budgets(few: Results) -> list[int]:
    return sorted({point["nfe"] for curve in few["solvers"].values() for point in curve["points"]})


def _distance_table(few: Results, titles: Mapping[str, str]) -> Table:
    solvers = dict.fromkeys(exact["solver"] for exact in few["exact"].values())
    head = ["objective", *(f"NFE {budget}" for budget in _budgets(few)), " or ".join(solvers)]
    rows = list[list[str]]()
    for name, curve in few["solvers"].items():
        exact = few["exact"][name]
        cells = _cells(curve, few, _distance_text)
        rows.append([_title(name, few, titles), *cells, f"{with_error(exact, 2)} (NFE {exact['nfe']:.0f})"])
    return Table(head, rows)


def _error_table(few: Results, titles: Mapping[str, str]) -> Table:
    rows = list[list[str]]()
    for name, curve in few["solvers"].items():
        recognized = few["exact"][name].get("recognized")
        last = f"{recognized:.0%}" if recognized is not None else ""
        rows.append([_title(name, few, titles), *_cells(curve, few, _error_text), last])
    return Table(["error, recognized", *(f"NFE {budget}" for budget in _budgets(few)), "samples"], rows)


def _cells(curve: Results, few: Results, text: Callable[[Results], str]) -> list[str]:
    by_budget = {point["nfe"]: point for point in curve["points"]}
    return [text(by_budget[budget]) if budget in by_budget else "" for budget in _budgets(few)]


def _distance_text(point: Results) -> str:
    steps = f" in {point['steps']} steps" if point["steps"] != point["nfe"] else ""
    return f"{with_error(point, 2 if point['value'] < 100 else 0)}, {point['solver']}{steps}"


def _error_text(point: Results) -> str:
    share = f", {point['recognized']:.0%}" if "recognized" in point else ""
    return f"{point['error']:.3f}{share}"


def _student_table(few: Results) -> Table:
    rows = [
        [
            student["title"],
            f"{student['seeds']}",
            f"{student['steps']:,}",
            str(point["nfe"]),
            with_error(point, 2),
            f"{point['kernel_distance']:.4f}" if "kernel_distance" in point else "",
            f"{point['recognized']:.1%}" if "recognized" in point else "",
        ]
        for student in few["students"].values()
        for point in student["points"]
    ]
    head = ["model", "seeds", "further steps", "NFE", "Fréchet distance", "kernel distance", "recognized"]
    return Table(head, rows)


def _figure(few: Results, titles: Mapping[str, str]) -> list[Figure]:
    caption = (
        "Distance against evaluations: each objective with its best solver (lines), students (dashed), and "
        "the samples of the other tables (dotted, at their own number of evaluations)."
    )
    return [Figure(few_step_drawing(few, titles), caption)]


@styled
def few_step_drawing(few: Results, titles: Mapping[str, str]) -> Drawing:
    """Draw the distance against the number of evaluations, for all objectives and students."""
    figure, (axes,) = new_axes(size=(5.2, 3.4))
    for name, curve in few["solvers"].items():
        label, points = plain_text(titles[name]), curve["points"]
        exact = few["exact"][name]
        x = [point["nfe"] for point in points]
        (line,) = axes.plot(x, [point["value"] for point in points], marker=".", linewidth=1.4, label=label)
        axes.plot(
            [x[-1], exact["nfe"]],
            [points[-1]["value"], exact["value"]],
            marker="o",
            markersize=3,
            linestyle=":",
            linewidth=1,
            color=line.get_color(),
        )
    for student in few["students"].values():
        axes.plot(
            [point["nfe"] for point in student["points"]],
            [point["value"] for point in student["points"]],
            marker="s",
            markersize=4,
            linestyle="--",
            linewidth=1.2,
            label=plain_text(student["title"]),
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_axis(axes.xaxis)
    plain_log_axis(axes.yaxis)
    axes.set_xlabel("NFE")
    axes.set_ylabel("Fréchet distance")
    axes.grid(visible=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=1.6)
    return Drawing(figure)
