"""The page of a comparison on images: the paper's table and figures, and what they say of its claims."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fm_core.report.html import Figure, PageSection, Table, page
from fm_core.report.image_grids import data_uri, grid, png
from fm_core.reproduce.comparison_figures import Curve, against_evaluations, against_images, from_one_noise
from fm_core.reproduce.deviations import deviations, trained
from fm_core.reproduce.paper_results import DRAWS, key_of, paper_results

CLAIMS = {
    "evaluations": "Reaches the other's quality with fewer evaluations of the network",
    "training": "Distance falls faster while training",
    "samples": "Samples are better",
}
NOTE_ON_TABLE = (
    "Every objective has the same data in the same order, the same noise by stream position, the same "
    "initial weights, network, optimizer and budget; nothing was searched for one of them alone."
)
WAYS = 3
"""Images whose way from noise is shown."""
Results = Mapping[str, Any]
Pictures = Mapping[str, Mapping[str, Tensor]]


def comparison_page(results: Results, pictures: Pictures) -> str:
    """The whole page; arguments as `comparison_sections`."""
    config = results["config"]
    seeds = config["reproduce"]["images"]["seeds"]
    lead = (
        f"{results['data']}: {len(results['summary'])} objectives, {config['train']['images']:,} images seen "
        f"by each unless the table says otherwise, seeds {', '.join(map(str, seeds))}."
    )
    last = PageSection("Configuration", [], text=json.dumps(config, indent=1))
    sections = [*comparison_sections(results, pictures), last]
    return page("Flow matching and what it was compared with", lead, sections)


def comparison_sections(results: Results, pictures: Pictures) -> list[PageSection]:
    """The table, the verdicts and the figures.

    Args:
        results: the content of results.json.
        pictures: by run, `images` uint8 [budgets, n, C, H, W] and `levels`, and where it was kept
            `trajectory` uint8 [T, n, C, H, W].
    """
    sections = [_table(results), *_published(results), _verdicts(results)]
    if results["failed"]:
        rows = [[run, error] for run, error in results["failed"].items()]
        sections.insert(0, PageSection("Failed", [Table(["run", "error"], rows)]))
    sections += [*_curves(results), *_ways(results, pictures), *_samples(results, pictures)]
    unlike = Table(["", "here", "in the paper"], deviations(results["config"]))
    return [*sections, PageSection("What differs from the paper", [unlike])]


def _table(results: Results) -> PageSection:
    head = ["objective", "bits/dim", "Fréchet distance", "NFE", "images seen"]
    rows = [
        [
            cell["title"],
            _with_error(cell.get("bits_per_dim"), 3),
            _with_error(cell["frechet_distance"], 2),
            _with_error(cell["nfe"], 0) if len(cell["runs"]) > 1 else f"{cell['nfe']['value']:.0f}",
            f"{cell['images_seen']:,}",
        ]
        for cell in results["summary"].values()
    ]
    errors = sorted({cell["error_is"] for cell in results["summary"].values()})
    features = sorted({record["scores"]["frechet_distance"]["features"] for record in results["cells"]})
    note = f"{NOTE_ON_TABLE}{_own_settings(results)} NFE: evaluations of the network a sample, by "
    note += f"{_solver(results)}. ±: {', '.join(errors)}. Features: {', '.join(features)}"
    return PageSection("Table 1", [Table(head, rows)], note + _held_out(results))


def _own_settings(results: Results) -> str:
    """Which cells have settings of their own, if any."""
    cells = results["config"]["reproduce"]["cells"]
    own = [
        cell["title"] or cell["name"]
        for cell in cells
        if cell["objective_options"] or cell["path_options"] or cell["steps"]
    ]
    return f" Options or steps of their own have {', '.join(own)}." if own else ""


def _solver(results: Results) -> str:
    sample = results["config"]["sample"]
    how = f" in {sample['steps']} steps" if sample["steps"] else ""
    tolerances = f" at {sample['rtol']:g}" if sample["rtol"] and not how else ""
    return f"{sample['solver']}{tolerances}{how}"


def _held_out(results: Results) -> str:
    real = [record["scores"].get("frechet_distance_of_held_out") for record in results["cells"]]
    if not real or not real[0]:
        return "."
    return f"; real held-out images are at {real[0]['value']:.2f} from the same reference."


def _published(results: Results) -> list[PageSection]:
    rows = paper_results(results["data"])
    if rows is None:
        return []
    body = [[title, f"{bits:.2f}", f"{fid:.2f}", str(nfe)] for title, (bits, fid, nfe) in rows.items()]
    draws = DRAWS[key_of(results["data"])]
    note = (
        "Lipman et al. (2023), table 1. Not to be mixed with the numbers above: FID there by the "
        f"TensorFlow-GAN library, bits/dim with K = {draws} dequantisation draws; moving averages and the "
        f"number of images behind FID are not stated. Trained on {trained(results['data'])}; here on "
        f"{results['config']['train']['images']:,} images."
    )
    return [PageSection("The paper's own", [Table(["objective", "bits/dim", "FID", "NFE"], body)], note)]


def _verdicts(results: Results) -> PageSection:
    titles = {name: cell["title"] for name, cell in results["summary"].items()}
    rows = [
        [CLAIMS[claim], titles[cell], verdict["words"]]
        for claim in CLAIMS
        for cell, verdict in results["claims"].get(claim, {}).items()
    ]
    note = (
        "The paper claims three things of flow matching on the optimal-transport path. Costs are those that "
        "were measured, not interpolated; a standard error of the other's best distance is granted to both. "
        "Ranges (16% to 84%) come from drawing every distance anew within its error."
    )
    if not rows:
        note += " It is not among the cells, or alone."
    return PageSection(
        "The paper's claims", [Table(["claim", "against", "measured"], rows)] if rows else [], note
    )


def _curves(results: Results) -> list[PageSection]:
    titles = {name: cell["title"] for name, cell in results["summary"].items()}
    sections: list[PageSection] = []
    training = results["curves"]["while_training"]
    if any(training.values()):
        distances = [
            _line(titles[n], [(p["images_seen"], p["value"], p["stderr"]) for p in c])
            for n, c in training.items()
        ]
        nfe = [
            Curve(titles[n], [p["images_seen"] for p in c], [p["nfe"] for p in c])
            for n, c in training.items()
        ]
        caption = (
            "Left: distance of samples at each checkpoint (figure 5). Right: NFE of the samples (figure 10)."
        )
        sections.append(PageSection("While training", [_plot(against_images(distances, nfe), caption)]))
    solvers = results["curves"]["solvers"]
    if any(solvers.values()):
        errors = {
            s: [Curve(titles[n], [p["nfe"] for p in c], [p["error"] for p in c]) for n, c in cells.items()]
            for s, cells in solvers.items()
        }
        distances_by = {
            s: [_line(titles[n], [(p["nfe"], p["value"], p["stderr"]) for p in c]) for n, c in cells.items()]
            for s, cells in solvers.items()
        }
        caption = (
            "Above: root mean square difference from the solution with very many evaluations, from the same "
            "noise. Below: Fréchet distance (figure 7)."
        )
        sections.append(
            PageSection("Fewer evaluations", [_plot(against_evaluations(errors, distances_by), caption)])
        )
    return sections


def _ways(results: Results, pictures: Pictures) -> list[PageSection]:
    shown = {cell["title"]: pictures[cell["runs"][0]] for cell in results["summary"].values()}
    kept = {title: drawn for title, drawn in shown.items() if "trajectory" in drawn}
    if not kept:
        return []
    levels = int(next(iter(kept.values()))["levels"])
    count = min(WAYS, *(drawn["trajectory"].shape[1] for drawn in kept.values()))
    parts = [
        _plot(
            from_one_noise({title: drawn["trajectory"][:, number] for title, drawn in kept.items()}, levels),
            f"The noise of image {number}, at equally spaced times from t = 0 (left) to t = 1 (right)",
        )
        for number in range(count)
    ]
    solver = results["config"]["sample"]["solver"]
    note = f"Each objective's model carries the same noise to data, solved by {solver}. The paper's figure 6."
    return [PageSection("Sampling paths from one noise", parts, note)]


def _samples(results: Results, pictures: Pictures) -> list[PageSection]:
    budgets = results["config"]["reproduce"]["images"]["shown_nfe"]
    parts: list[Table | Figure] = []
    for cell in results["summary"].values():
        drawn = pictures[cell["runs"][0]]
        images, levels = drawn["images"], int(drawn["levels"])
        sheet = grid(images.flatten(0, 1), levels, images.shape[1], max(1, 24 // images.shape[-1]))
        caption = f"{cell['title']}: a row each for {', '.join(map(str, budgets))} evaluations (midpoint)"
        parts.append(Figure(data_uri(png(sheet)), caption))
    note = "The same noise in every column. The paper's figures 16 and 17."
    return [PageSection("Samples at few evaluations", parts, note)] if parts else []


def _line(label: str, points: Sequence[tuple[float, float, float]]) -> Curve:
    return Curve(label, [p[0] for p in points], [p[1] for p in points], [p[2] for p in points])


def _with_error(number: Mapping[str, float] | None, digits: int) -> str:
    return f"{number['value']:.{digits}f} ± {number['stderr']:.{digits}f}" if number else "not asked for"


def _plot(content: bytes, caption: str) -> Figure:
    return Figure(data_uri(content), caption, plot=True)
