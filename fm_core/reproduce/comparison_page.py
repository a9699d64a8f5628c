"""The page of a comparison on images: the paper's table and figures, and the verdicts on its claims."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fm_core.report.html import PageSection, Table, page
from fm_core.report.score_text import accuracy_text, score_record, with_error
from fm_core.reproduce.claims import FALSE_POSITIVES
from fm_core.reproduce.comparison_figures import (
    TRAJECTORIES,
    sample_galleries,
    score_error_bars,
    solver_figures,
    training_figures,
    trajectory_galleries,
)
from fm_core.reproduce.few_step_page import few_step_sections
from fm_core.reproduce.paper_results import (
    DRAWS,
    deviations,
    paper_results,
    table_key,
    training_budget,
)
from fm_core.reproduce.run_tables import Results, distance_ratios, memorization, paired_bits

CLAIMS = {
    "evaluations": "Reaches the other's quality with fewer evaluations of the network",
    "training": "Distance falls faster during training",
    "samples": "Samples are better",
}
NOTE_ON_TABLE = (
    "Every objective has the same data in the same order, the same noise by stream position, the same "
    "initial weights, network, optimizer and budget; no objective was tuned individually."
)
ImagesByRun = Mapping[str, Mapping[str, Tensor]]


def comparison_page(results: Results, images: ImagesByRun, files: PageSection | None = None) -> str:
    """The page as HTML; arguments as in `comparison_sections`, and a section with links to the files."""
    config = results["config"]
    seeds = sorted({record["seed"] for record in results["cells"] if "seed" in record})
    lead = (
        f"{results['data']}: {len(results['summary'])} objectives, {config['train']['images']:,} images seen "
        f"by each unless the table says otherwise, seeds {', '.join(map(str, seeds))}."
    )
    last = PageSection("Configuration", [], text=json.dumps(config, indent=1), folded=True)
    sections = [*comparison_sections(results, images), last, *([files] if files else [])]
    return page("Flow matching and what it was compared with", lead, sections)


def comparison_sections(results: Results, images: ImagesByRun) -> list[PageSection]:
    """The table, the verdicts and the figures.

    Args:
        results: the content of results.json.
        images: for each run, `images` uint8 [budgets, n, C, H, W] and `levels` and, if trajectories are
            saved, `trajectory` uint8 [T, n, C, H, W].
    """
    sections = [_table(results), *_paper_table(results), _verdicts(results), *paired_bits(results)]
    sections += [*distance_ratios(results), *memorization(results)]
    if results["failed"]:
        rows = [[run, error] for run, error in results["failed"].items()]
        sections.insert(0, PageSection("Failed", [Table(["run", "error"], rows)]))
    sections += [
        *few_step_sections(results),
        *_curves(results),
        *_trajectories(results, images),
        *_samples(results, images),
    ]
    differences = Table(["", "here", "in the paper"], deviations(results["config"]))
    return [*sections, PageSection("Differences from the paper", [differences])]


def _table(results: Results) -> PageSection:
    summary = results["summary"].values()
    draws = sorted({row["bits_per_dim_k_sample"]["k"] for row in summary if "bits_per_dim_k_sample" in row})
    limits = any("infinity" in row["frechet_distance"] for row in summary)
    head = [
        "objective",
        "bits/dim, K = 1",
        *([f"bits/dim, K = {' or '.join(map(str, draws))}"] if draws else []),
        "Fréchet distance",
        *(["its limit for infinitely many images"] if limits else []),
        "NFE",
        "images seen",
    ]
    rows = [
        [
            row["title"],
            _with_error(row.get("bits_per_dim"), 3),
            *([_with_error(row.get("bits_per_dim_k_sample"), 3)] if draws else []),
            _with_error(row["frechet_distance"], 2),
            *([_with_error(row["frechet_distance"].get("infinity"), 2, "not known")] if limits else []),
            _with_error(row["nfe"], 0) if len(row["runs"]) > 1 else f"{row['nfe']['value']:.0f}",
            f"{row['images_seen']:,}",
        ]
        for row in summary
    ]
    note = f"{NOTE_ON_TABLE}{_own_settings(results)} NFE: evaluations of the network per sample, by "
    note += f"{_solver(results)}. {_note_on_errors(results)} {_note_on_features(results)}"
    parts = [Table(head, rows), *score_error_bars(list(summary))]
    return PageSection("Table 1", parts, f"{note} {_validation_distance(results)}".strip())


def _note_on_errors(results: Results) -> str:
    """Explanation of ± in the table, and of why an error is unreliable."""
    summary = results["summary"].values()
    errors = ", ".join(sorted({row["error_is"] for row in summary}))
    reasons = sorted({reason for row in summary if (reason := row["frechet_distance"].get("unreliable"))})
    note = f"±: {errors}."
    if any(len(row["runs"]) == 1 for row in summary):
        note += " With one seed it does not cover training: another seed may differ by more."
    return note + (f" ± of the distance is unreliable: {', '.join(reasons)}." if reasons else "")


def _note_on_features(results: Results) -> str:
    """The features used for the distances and, for a classifier, its held-out accuracy."""
    features = sorted({record["scores"]["frechet_distance"]["features"] for record in results["cells"]})
    accuracies = [text for record in results["cells"][:1] if (text := accuracy_text(record["scores"]))]
    return f"Features: {', '.join([*features, *accuracies])}."


def _own_settings(results: Results) -> str:
    """A sentence that lists the experiments with individual settings, if any."""
    names = [
        section["title"] or section["name"]
        for section in results["config"]["reproduce"]["cells"]
        if section["objective_options"] or section["path_options"] or section["steps"]
    ]
    return f" With options or steps of their own: {', '.join(names)}." if names else ""


def _solver(results: Results) -> str:
    sample = results["config"]["sample"]
    steps = f" in {sample['steps']} steps" if sample["steps"] else ""
    tolerances = f" at {sample['rtol']:g}" if sample["rtol"] and not steps else ""
    return f"{sample['solver']}{tolerances}{steps}"


def _validation_distance(results: Results) -> str:
    real = [record["scores"].get("frechet_distance_of_held_out") for record in results["cells"]]
    if not real or not real[0]:
        return ""
    distance = f"{with_error(real[0], 2)}, {real[0]['images']:,} of them"
    limit = score_record({"frechet_distance": real[0]}, "frechet_limit")
    known = f"; limit {with_error(limit, 2)}" if limit else "; its limit is not known"
    note = f"Real validation images, from the same reference: {distance}{known}."
    samples = {record["scores"]["frechet_distance"].get("images") for record in results["cells"]}
    if samples == {real[0]["images"]}:
        return note
    return f"{note} A distance of fewer images is larger: compare the limits, or samples of as many images."


def _paper_table(results: Results) -> list[PageSection]:
    rows = paper_results(results["data"])
    if rows is None:
        return []
    body = [[title, f"{bits:.2f}", f"{fid:.2f}", str(nfe)] for title, (bits, fid, nfe) in rows.items()]
    draws = DRAWS[table_key(results["data"])]
    note = (
        "Lipman et al. (2023), table 1. Not comparable with the numbers above: the paper computes FID with "
        f"the TensorFlow-GAN library and bits/dim with K = {draws} dequantization draws; it does not state "
        "moving averages and the number of images behind FID. Trained on "
        f"{training_budget(results['data'])}; here on {results['config']['train']['images']:,} images."
    )
    return [PageSection("Published results", [Table(["objective", "bits/dim", "FID", "NFE"], body)], note)]


def _verdicts(results: Results) -> PageSection:
    titles = {name: row["title"] for name, row in results["summary"].items()}
    rows = [
        [CLAIMS[claim], titles[name], verdict["words"]]
        for claim in CLAIMS
        for name, verdict in results["claims"].get(claim, {}).items()
    ]
    note = (
        "The paper makes three claims about flow matching on the optimal-transport path. Costs are measured, "
        "not interpolated; the target is the other's best distance plus its standard error. Ranges (16% to "
        "84%) come from resampling every distance within its error. With several seeds the errors are "
        "deviations over seeds, and the thresholds those of Student's t."
    )
    if rows:
        note += (
            f" {len(rows)} comparisons, each with a probability of at most {FALSE_POSITIVES:.0%} of a "
            f"difference where there is none: expect {len(rows) * FALSE_POSITIVES:.1f} of them by chance."
        )
    if not rows:
        note += " This objective is not among the experiments, or it is the only one."
    return PageSection(
        "The paper's claims", [Table(["claim", "against", "measured"], rows)] if rows else [], note
    )


def _curves(results: Results) -> list[PageSection]:
    sections: list[PageSection] = []
    if any(results["curves"]["while_training"].values()):
        sections.append(PageSection("While training", training_figures(results)))
    if any(results["curves"]["solvers"].values()):
        sections.append(PageSection("Fewer evaluations", solver_figures(results), "The paper's figure 7."))
    return sections


def _trajectories(results: Results, images: ImagesByRun) -> list[PageSection]:
    by_title = {row["title"]: images[row["runs"][0]] for row in results["summary"].values()}
    trajectories = {title: t["trajectory"] for title, t in by_title.items() if "trajectory" in t}
    if not trajectories:
        return []
    levels = int(next(iter(by_title.values()))["levels"])
    count = min(TRAJECTORIES, *(trajectory.shape[1] for trajectory in trajectories.values()))
    solver = results["config"]["sample"]["solver"]
    note = f"Trajectories of each objective's model from the same noise, by {solver}. The paper's figure 6."
    galleries = trajectory_galleries(trajectories, levels, count)
    return [PageSection("Sampling paths from one noise", galleries, note)]


def _samples(results: Results, images: ImagesByRun) -> list[PageSection]:
    by_title = {row["title"]: images[row["runs"][0]] for row in results["summary"].values()}
    note = "The same noise in every column. The paper's figures 16 and 17."
    galleries = sample_galleries(by_title, results["config"]["reproduce"]["images"]["shown_nfe"])
    return [PageSection("Samples at few evaluations", galleries, note)] if galleries else []


def _with_error(number: Mapping[str, Any] | None, digits: int, absent: str = "not requested") -> str:
    return with_error(number, digits) if number else absent
