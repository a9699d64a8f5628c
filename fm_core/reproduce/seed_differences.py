"""Paired differences of bits/dim between the objectives of a comparison."""

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fm_core.report.paired_bits import PairedDifference, paired_difference, read_bits
from fm_core.reproduce.claims import ONE_SEED, Measured, critical_deviation

Record = Mapping[str, Any]


def paired_bits(groups: Mapping[str, Sequence[Record]], candidate: str) -> dict[str, dict[str, Any]]:
    """Differences of bits/dim, candidate minus each other objective: name of the other -> K -> record.

    Runs with the same seed share images, draws and probes. With several seeds, the error is the deviation of
    the mean difference over seeds; with one seed, the deviation over images. Objectives without bits/dim of
    individual images are omitted.

    Args:
        groups: records of the runs by objective, one per seed.
        candidate: name of the objective with which the others are compared.
    """
    if candidate not in groups:
        return {}
    differences = dict[str, dict[str, Any]]()
    for name, others in groups.items():
        for column, draws in _columns(groups[candidate][0]).items():
            pairs = _pairs(groups[candidate], others, column) if name != candidate else []
            if pairs:
                differences.setdefault(name, {})[str(draws)] = _record(pairs)
    return differences


def _columns(record: Record) -> dict[str, int]:
    """Columns of the bits/dim files -> K of the column."""
    bits = record["scores"].get("bits_per_dim", {})
    return {"bits": 1, **({"k_sample": bits["k_sample"]["k"]} if "k_sample" in bits else {})}


def _pairs(mine: Sequence[Record], others: Sequence[Record], column: str) -> list[PairedDifference]:
    """The paired difference for each seed that both objectives have."""
    by_seed = {record.get("seed"): record for record in others}
    pairs = list[PairedDifference]()
    for record in mine:
        other = by_seed.get(record.get("seed"))
        files = [run.get("scores_file") for run in (record, other) if run is not None]
        bits = [read_bits(Path(file)) for file in files if file]
        if len(bits) == 2 and bits[0] and bits[1] and (pair := paired_difference(bits[0], bits[1], column)):
            pairs.append(pair)
    return pairs


def _record(pairs: Sequence[PairedDifference]) -> dict[str, Any]:
    seeds = len(pairs)
    value = fmean(pair.value for pair in pairs)
    stderr = pairs[0].stderr if seeds == 1 else stdev(pair.value for pair in pairs) / sqrt(seeds)
    threshold = critical_deviation(Measured(value, stderr, seeds), Measured(0.0, 0.0))
    result = "not distinguishable"
    if abs(value) > threshold * stderr:
        result = "fewer" if value < 0 else "more"
    unpaired = sqrt(sum(pair.unpaired**2 for pair in pairs)) / seeds
    over = f"{pairs[0].images:,} images" if seeds == 1 else f"{seeds} seeds"
    words = f"{result}: {value:+.4f} ± {stderr:.4f} over {over} (images unpaired: ± {unpaired:.4f})"
    return {
        "value": value,
        "stderr": stderr,
        "seeds": seeds,
        "images": pairs[0].images,
        "covers": "training seeds" if seeds > 1 else "validation images",
        "words": words if seeds > 1 else f"{words}; {ONE_SEED}",
    }
