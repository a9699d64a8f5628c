"""Tables of a comparison with a row for each run: FDr, memorization, differences of bits/dim."""

from collections.abc import Mapping
from typing import Any

from fm_core.report.html import PageSection, Table
from fm_core.report.memorization_table import HEAD, NOTE, memorization_rows
from fm_core.report.score_text import further_scores, with_error

Results = Mapping[str, Any]


def distance_ratios(results: Results) -> list[PageSection]:
    """Distance, that of real images, and their ratio for each run and extractor; empty without ratios."""
    rows = list[list[str]]()
    for run in results["cells"]:
        scores = run["scores"]
        for own in (scores, *further_scores(scores).values()):
            if ratio := own.get("frechet_distance_ratio"):
                distance = own.get("frechet_distance_of_as_many", own["frechet_distance"])
                rows.append(
                    [
                        run["run"],
                        ratio["features"],
                        with_error(distance, 2),
                        with_error(own["frechet_distance_of_held_out"], 2),
                        with_error(ratio, 3),
                    ]
                )
    if not rows:
        return []
    head = ["run", "features", "distance of samples", "of as many validation images", "FDr"]
    note = (
        "FDr is the Fréchet distance of the samples to the reference, divided by that of as many real "
        "validation images: 1 is as near as real images. ± covers both sets of images, not the training."
    )
    return [PageSection("Distances relative to real images", [Table(head, rows)], note)]


def memorization(results: Results) -> list[PageSection]:
    """Memorization of each run."""
    rows = [
        [f"{record['run']}: {row[0]}", *row[1:]]
        for record in results["cells"]
        for row in memorization_rows(record["scores"])
    ]
    return [PageSection("Memorization", [Table(HEAD, rows)], NOTE)] if rows else []


def paired_bits(results: Results) -> list[PageSection]:
    """Paired per-image differences of bits/dim, if there are any."""
    titles = {name: row["title"] for name, row in results["summary"].items()}
    rows = [
        [titles[name], f"K = {k}", record["words"]]
        for name, by_draws in results.get("paired_bits", {}).items()
        for k, record in by_draws.items()
    ]
    if not rows:
        return []
    note = (
        "Bits/dim of flow matching on the optimal-transport path less that of the others, for the same "
        "images, draws and probes: what these share cancels, so that the errors are smaller than in table 1. "
        f"{len(rows)} comparisons."
    )
    return [PageSection("Paired differences of bits/dim", [Table(["less", "", "difference"], rows)], note)]
