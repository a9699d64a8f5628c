"""The section of a comparison's page about few evaluations: tables, verdicts and the figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from fm_core.report.drawing import Drawing, new_axes, plain_log_axis, plain_text, styled
from fm_core.report.html import Figure, PageSection, Table
from fm_core.report.score_text import with_error

Results = Mapping[str, Any]


def few_step_sections(results: Results) -> list[PageSection]:
    """The section, from the content of results.json; empty if nothing was scored at few evaluations."""
    few = results.get("few_steps")
    if not few:
        return []
    titles = {name: row["title"] for name, row in results["summary"].items()}
    chosen = (
        "chosen for each seed by the other seeds, so that the choice does not bias its distance"
        if few["seeds"] > 1
        else "chosen by these distances themselves, which are therefore too low"
    )
    count = len(results["config"]["reproduce"]["few_steps"]["solvers"])
    note = (
        f"Fréchet distance of {few['images']:,} images with the best of {count} solvers and time grids for "
        f"each objective and number of evaluations, {chosen}; the named solver is the best over all seeds. "
        f"± is the {few['error_is'].removeprefix('the ')}. All columns start from the same noise."
    )
    sections = [
        PageSection(
            "Few evaluations without training", [_solver_table(few, titles), *_figure(few, titles)], note
        )
    ]
    if few["students"]:
        students = (
            "Students start from the model of their teacher and are trained further, which the solvers above "
            "do not need. The images and their noise are the same."
        )
        sections.append(PageSection("Few evaluations after training", [_student_table(few)], students))
    if few["verdicts"]:
        rows = [[question, titles.get(name, name), words] for question, name, words in few["verdicts"]]
        sections.append(
            PageSection("What few evaluations cost", [Table(["question", "model", "measured"], rows)])
        )
    return sections


def _solver_table(few: Results, titles: Mapping[str, str]) -> Table:
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = few["solvers"]
    budgets = sorted({point["nfe"] for points in curves.values() for point in points})
    head = ["objective", *(f"NFE {budget}" for budget in budgets), "dopri5"]
    rows = list[list[str]]()
    for name, points in curves.items():
        by_budget = {point["nfe"]: point for point in points}
        cells = [_cell(by_budget[budget]) if budget in by_budget else "" for budget in budgets]
        exact = few["exact"][name]
        rows.append([titles[name], *cells, f"{with_error(exact, 2)} ({exact['nfe']:.0f})"])
    return Table(head, rows)


def _cell(point: Mapping[str, Any]) -> str:
    shown = f"{with_error(point, 2 if point['value'] < 100 else 0)}, {point['solver']}"
    return f"{shown}, {point['recognized']:.0%} recognized" if "recognized" in point else shown


def _student_table(few: Results) -> Table:
    rows = [
        [
            student["title"],
            f"{student['steps']:,}",
            str(point["nfe"]),
            with_error(point, 2),
            f"{point['kernel_distance']:.4f}" if "kernel_distance" in point else "",
            f"{point['recognized']:.1%}" if "recognized" in point else "",
        ]
        for student in few["students"].values()
        for point in student["points"]
    ]
    head = ["model", "further steps", "NFE", "Fréchet distance", "kernel distance", "recognized"]
    return Table(head, rows)


def _figure(few: Results, titles: Mapping[str, str]) -> list[Figure]:
    caption = (
        "Distance against evaluations: each objective with its best solver (lines), students (dashed), and "
        "dopri5 (dotted, at its own number of evaluations)."
    )
    return [Figure(few_step_drawing(few, titles), caption)]


@styled
def few_step_drawing(few: Results, titles: Mapping[str, str]) -> Drawing:
    """Draw the distance against the number of evaluations, for all objectives and students."""
    figure, (axes,) = new_axes(size=(5.2, 3.4))
    for name, points in few["solvers"].items():
        label = plain_text(titles[name])
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
