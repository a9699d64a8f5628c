"""The page of the 2-D comparison: tables of numbers and the figures."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fm_core.method.paths import Path
from fm_core.report.html import Figure, PageSection, Table, page
from fm_core.report.plots import ErrorBar, error_bar_plot
from fm_core.reproduce.claims import FALSE_POSITIVES
from fm_core.reproduce.toy2d.few_evaluations import few_evaluations_section
from fm_core.reproduce.toy2d.figures import (
    FigureData,
    conditional_fields,
    conditional_trajectories,
    lines_and_densities,
    samples_over_time_and_budget,
)

NOTE_ON_SCORES = (
    "NLL: exact trace, dopri5, on held-out points; the standard error is that of the mean over points. The "
    "entropy of the data is a lower bound for every model. NFE: evaluations of the network to draw a sample "
    "with dopri5. Every objective had the same data, noise and times by stream position, the same initial "
    "weights, and the same optimizer; no objective was tuned individually. Reflow students begin with the "
    "weights of their teacher and have had more training."
)
NOTE_ON_SHARES = (
    "Share of samples that lie on one of the data's squares, by number of evaluations of the network "
    "(midpoint rule) and, last, with dopri5. The data have 100 %; a uniform distribution on the whole board "
    "would have 50 %."
)


def page_2d(
    results: Mapping[str, Any],
    experiments: Sequence[FigureData],
    paths: Mapping[str, Path],
    files: PageSection | None = None,
) -> str:
    """The page as HTML; arguments as in `sections_2d`, and a section with links to the files."""
    protocol = results["protocol"]
    lead = (
        f"{protocol['data']}; a multilayer perceptron of {protocol['layers']} layers of {protocol['width']} "
        f"neurons; {protocol['steps']:,} steps of {protocol['batch']} points for each objective unless the "
        f"table says otherwise."
    )
    last = PageSection("Protocol", [], text=json.dumps(protocol, indent=1), folded=True)
    sections = [*sections_2d(results, experiments, paths), last, *([files] if files else [])]
    return page("Flow matching in 2-D", lead, sections)


def sections_2d(
    results: Mapping[str, Any], experiments: Sequence[FigureData], paths: Mapping[str, Path]
) -> list[PageSection]:
    """The tables of numbers and the figures.

    Args:
        results: the content of results.json.
        experiments: tensors of the complete experiments; may be empty.
        paths: the distinct paths of the experiments by name, in the order of the experiments.
    """
    sections = [_scores(results), *over_seeds_section(results), _shares(results)]
    sections += few_evaluations_section(results)
    if results["failed"]:
        rows = [[label, error] for label, error in results["failed"].items()]
        sections.insert(0, PageSection("Failed", [Table(["objective", "error"], rows)]))
    budgets = results["protocol"]["nfe"]
    return [
        *sections,
        *_model_figures(experiments, budgets),
        *_path_figures(paths, results["diffusion_paths"]),
    ]


def _scores(results: Mapping[str, Any]) -> PageSection:
    head = [
        "objective", "steps", "NLL, nats", "NLL, bits", "above entropy", "NFE", "training", "scoring",
    ]  # fmt: skip
    entropy = results["entropy"]
    rows = [["the data's entropy", "", f"{entropy['nats']:.3f}", f"{entropy['bits']:.3f}", "0", "", "", ""]]
    for record in results["cells"].values():
        nll = record["nll"]
        rows.append(
            [
                record["label"],
                f"{record['steps']:,}",
                f"{nll['nats']:.3f} ± {nll['stderr_nats']:.3f}",
                f"{nll['bits']:.3f}",
                f"{nll['excess_over_entropy_nats']:.3f}",
                f"{record['nfe']['dopri5']}",
                f"{record['training_seconds']:.0f} s",
                f"{record['scoring_seconds']:.0f} s",
            ]
        )
    bars = [
        ErrorBar(record["label"], record["nll"]["nats"], record["nll"]["stderr_nats"])
        for record in results["cells"].values()
    ]
    if not bars:
        return PageSection("Scores", [Table(head, rows)], NOTE_ON_SCORES)
    drawing = error_bar_plot("NLL, nats", bars, from_zero=False)
    caption = f"NLL, lower is better; bars are one standard error. Entropy: {entropy['nats']:.3f} nats."
    return PageSection("Scores", [Table(head, rows), Figure(drawing, caption)], NOTE_ON_SCORES)


def over_seeds_section(results: Mapping[str, Any]) -> list[PageSection]:
    """NLL and NFE over seeds, with the verdicts; none for one seed."""
    records = results.get("over_seeds", {})
    if not records:
        return []
    rows = [
        [
            record["title"],
            f"{len(record['seeds'])}",
            f"{record['nll_nats']['value']:.3f} ± {record['nll_nats']['stderr']:.3f}",
            f"{record['nfe']['value']:.0f} ± {record['nfe']['stderr']:.0f}",
            record.get("verdict", {}).get("words", ""),
        ]
        for record in records.values()
    ]
    comparisons = sum("verdict" in record for record in records.values())
    note = (
        "±: deviation over seeds. The verdict is about the NLL of flow matching on the optimal-transport "
        f"path against that of the objective, by Student's t over seeds; {comparisons} comparisons, each "
        f"with a probability of at most {FALSE_POSITIVES:.0%} of a difference where there is none."
    )
    head = ["objective", "seeds", "NLL, nats", "NFE", "FM-OT against it"]
    return [PageSection("Over seeds", [Table(head, rows)], note)]


def _shares(results: Mapping[str, Any]) -> PageSection:
    budgets = [str(nfe) for nfe in results["protocol"]["nfe"]]
    rows = [
        [record["label"], *(f"{record['on_squares'][key]:.1%}" for key in [*budgets, "dopri5"])]
        for record in results["cells"].values()
    ]
    head = ["objective", *(f"NFE {budget}" for budget in budgets), "dopri5"]
    return PageSection("Samples on the squares", [Table(head, rows)], NOTE_ON_SHARES)


def _model_figures(experiments: Sequence[FigureData], budgets: Sequence[int]) -> list[PageSection]:
    if not experiments:
        return []
    evolution = (
        "Left: the same noise transported to five times (dopri5). Right: samples at few evaluations of the "
        "network (midpoint rule). One color scale for all. The paper's figures 4 and 9."
    )
    lines = (
        "Above: trajectories from the same noise, blue at the start and red at the end. Below: the density "
        "of the model, by the instantaneous change of variables with the exact trace, on one color scale."
    )
    snapshots = samples_over_time_and_budget(experiments, budgets)
    return [
        PageSection("Trajectories and samples", [Figure(snapshots, evolution)]),
        PageSection("Trajectories and densities", [Figure(lines_and_densities(experiments), lines)]),
    ]


def _path_figures(paths: Mapping[str, Path], diffusions: Sequence[str]) -> list[PageSection]:
    fields = (
        "The star is the data point x1. Arrows show directions, colors lengths (blue long, red short; one "
        "scale per row). The paper's figures 2 (first and last row) and 8."
    )
    lines = "From the same noise to one data point, the star. The paper's figure 3."
    return [
        PageSection("Conditional fields", [Figure(conditional_fields(paths, diffusions), fields)]),
        PageSection("Conditional trajectories", [Figure(conditional_trajectories(paths), lines)]),
    ]
