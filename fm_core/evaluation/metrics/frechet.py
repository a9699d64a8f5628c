"""The Fréchet distance between two sets of features, its error, and its limit for many images.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64 throughout (Dowson and Landau 1982; Heusel
et al. 2017). The trace of the root is that of (R S1 R)^(1/2) with R = S2^(1/2), a symmetric matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian, without_rounding

JACKKNIFE_BLOCKS = 20
"""Blocks of images that are left out in turn: image i is in block i mod 20, so that no order matters."""


@dataclass(frozen=True)
class Distance:
    """A Fréchet distance, its standard error and what it tends to."""

    value: float
    stderr: float
    """By leaving out one block of images at a time; the reference is taken as exact."""
    infinity: tuple[float, float] | None
    """Extrapolated to infinitely many images, linearly in 1/N (Chong and Forsyth 2020), and its standard
    error, rather too large than too small; None where half the images are no more than the features."""
    few: bool
    """Whether there were no more images than features, so that the covariance is singular."""


def frechet_distance(moments: FeatureMoments, reference: Gaussian) -> float:
    """The distance (squared, as FID is) of more than D images from a reference."""
    root, covariance = reference.root, moments.covariance
    cross = without_rounding(torch.linalg.eigvalsh(root @ covariance @ root)).sqrt().sum()
    return _combined(moments.mean, covariance.trace(), reference, cross)


def distance_alone(features: Tensor, reference: Gaussian) -> float:
    """The distance of features [N, D], whatever N >= 2 is, without an error."""
    if len(features) <= features.shape[1]:
        return frechet_distance_of_few(features, reference)
    return frechet_distance(FeatureMoments.of(features), reference)


def frechet_distance_of_few(features: Tensor, reference: Gaussian) -> float:
    """The same from the features [N, D] themselves: exact for N <= D, where the covariance is singular.

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least two images, not {len(features)}")
    rows = features.double()
    mean = rows.mean(0)
    centred = (rows - mean) / (len(rows) - 1) ** 0.5
    # With S1 = A^T A the trace is the sum of the singular values of A R: no root of a rounded zero is taken.
    cross = torch.linalg.svdvals(centred @ reference.root).sum()
    return _combined(mean, centred.square().sum(), reference, cross)


def distance(
    features: Tensor, reference: Gaussian, blocks: int = JACKKNIFE_BLOCKS, *, limit: bool = True
) -> Distance:
    """The distance of features [N, D] from a reference, with errors by the delete-a-block jackknife.

    Its cost is roots of [D, D] matrices: one, and one for each block. Without `limit`, or where half the
    images are no more than the features, that is all; the limit takes two more, and one for each block.

    Raises:
        ValueError: fewer than four images.
    """
    if len(features) < 4:
        raise ValueError(f"a distance and its error need at least four images, not {len(features)}")
    blocks = min(blocks, len(features) // 2) // 2 * 2
    limit = limit and len(features) > 2 * features.shape[1]
    whole = _Blocks(features, reference, blocks, fewest=blocks // 2 - 1 if limit else blocks - 1)
    everything = range(blocks)
    value = whole.of(everything)
    without = [whole.of([block for block in everything if block != left_out]) for left_out in everything]
    return Distance(
        value=value,
        stderr=jackknife_error(without),
        infinity=_infinity(whole, value, without) if limit else None,
        few=len(features) <= features.shape[1],
    )


def _infinity(whole: "_Blocks", value: float, without: Sequence[float]) -> tuple[float, float]:
    """The limit for many images and its error, from the distance of all blocks and those without each."""
    halves = [range(half, len(without), 2) for half in (0, 1)]
    by_half = [whole.of(half) for half in halves]
    limits = list[float]()
    for left_out, rest in enumerate(without):
        half, other = halves[left_out % 2], by_half[1 - left_out % 2]
        shrunk = [block for block in half if block != left_out]
        smaller = whole.of(shrunk) if shrunk else by_half[left_out % 2]
        limits.append(_limit(rest, (smaller + other) / 2))
    return _limit(value, sum(by_half) / 2), jackknife_error(limits)


def jackknife_error(without: Sequence[float]) -> float:
    """Standard error of a statistic from its values with one of B blocks left out."""
    values = torch.tensor(without, dtype=torch.float64)
    blocks = len(values)
    return ((blocks - 1) / blocks * (values - values.mean()).square().sum()).sqrt().item()


def _limit(whole: float, half: float) -> float:
    """F(N) = F + c / N through F(N) and F(N/2)."""
    return 2 * whole - half


class _Blocks:
    """Distances of unions of blocks of images; the moments of each block are taken once."""

    def __init__(self, features: Tensor, reference: Gaussian, count: int, fewest: int) -> None:
        """Cut into `count` blocks, of which at least `fewest` are joined at a time."""
        self.reference = reference
        self.blocks = [features[number::count] for number in range(count)]
        smallest = min(len(block) for block in self.blocks) * fewest
        self.moments = (
            [FeatureMoments.of(block) for block in self.blocks] if smallest > features.shape[1] else None
        )

    def of(self, numbers: Sequence[int]) -> float:
        if self.moments is None:
            return distance_alone(torch.cat([self.blocks[number] for number in numbers]), self.reference)
        total = self.moments[numbers[0]]
        for number in numbers[1:]:
            total = total + self.moments[number]
        return frechet_distance(total, self.reference)


def _combined(mean: Tensor, trace: Tensor, reference: Gaussian, cross: Tensor) -> float:
    difference = mean - reference.mean
    squared = difference @ difference + trace + reference.covariance.trace() - 2 * cross
    return max(0.0, squared.item())
