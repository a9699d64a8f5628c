"""Differences in bits/dim between models, paired by image.

All models are scored on the same images with the same draws and probes. The noise that they share cancels in
the difference, so its standard error is smaller than the standard errors of the two means suggest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

SHARED = ("likelihood", "data_version", "held_out_split", "levels", "seed", "generator")
"""Keys of a protocol that must agree, as they determine images, draws, probes and tolerances."""
Bits = Mapping[int, Mapping[str, float]]
"""Mapping from image index to `bits` (K = 1) and `k_sample` (K draws)."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference of two models over images."""

    value: float
    """Bits/dim of the first model minus bits/dim of the second."""
    stderr: float
    """Standard error over images, for these two networks."""
    unpaired: float
    """Standard error of the difference if the two means had no images in common."""
    images: int

    def __str__(self) -> str:
        over = f"over {self.images:,} images (unpaired ± {self.unpaired:.4f})"
        return f"{self.value:+.4f} ± {self.stderr:.4f} {over}"


def read_bits(scores_file: Path) -> Bits | None:
    """Read the bits/dim of individual images stored beside a scores file; None if there are none."""
    file = scores_file.with_suffix(".bits.jsonl")
    if not file.exists():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {line["image"]: {"bits": line["bits"], "k_sample": line["k_sample"]} for line in lines}


def paired_difference(first: Bits, second: Bits, column: str = "bits") -> PairedDifference | None:
    """Mean difference over images; None unless both have the same images, and at least two."""
    if first.keys() != second.keys() or len(first) < 2:
        return None
    mine, others = ([bits[image][column] for image in first] for bits in (first, second))
    differences = [a - b for a, b in zip(mine, others, strict=True)]
    count = len(differences)
    unpaired = hypot(stdev(mine), stdev(others)) / sqrt(count)
    return PairedDifference(fmean(differences), stdev(differences) / sqrt(count), unpaired, count)


def same_draws(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two protocols share images, draws and probes of bits/dim."""
    return "likelihood" in first and all(first.get(key) == second.get(key) for key in SHARED)


def difference_lines(
    names: Sequence[str], protocols: Sequence[Mapping[str, Any]], bits: Sequence[Bits | None]
) -> list[str]:
    """Return a line for each later set of scores that shares images, draws and probes with the first one."""
    lines = list[str]()
    for name, protocol, theirs in list(zip(names, protocols, bits, strict=True))[1:]:
        if bits[0] is None or theirs is None or not same_draws(protocols[0], protocol):
            continue
        if difference := paired_difference(theirs, bits[0]):
            lines.append(f"bits/dim (K = 1) of {name} less {names[0]}, paired: {difference}.")
    return lines
