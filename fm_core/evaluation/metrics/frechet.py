"""Fréchet distance between two sets of features, with standard error and extrapolation to N = infinity.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64 throughout (Dowson and Landau 1982; Heusel
et al. 2017). The trace of the square root equals that of (R S1 R)^(1/2) with R = S2^(1/2), a symmetric
matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian, zero_rounding_noise

JACKKNIFE_BLOCKS = 20
"""Blocks of the delete-a-block jackknife: image i is in block i mod 20, so that sorted images do no harm."""


@dataclass(frozen=True)
class FrechetEstimate:
    """A Fréchet distance, its standard error and its limit for N = infinity."""

    value: float
    stderr: float
    """By the delete-a-block jackknife; the reference is treated as exact."""
    infinity: tuple[float, float] | None
    """Extrapolation to N = infinity, linear in 1/N (Chong and Forsyth 2020), and its standard error, which is
    conservative; None if half the number of images is at most the number of features."""
    singular: bool
    """Whether there were at most as many images as features, so that the covariance is singular."""


def frechet_distance(moments: FeatureMoments, reference: Gaussian) -> float:
    """Fréchet distance (squared, like FID) of more than D images to a reference."""
    root, covariance = reference.root, moments.covariance
    cross = zero_rounding_noise(torch.linalg.eigvalsh(root @ covariance @ root)).sqrt().sum()
    return _frechet_formula(moments.mean, covariance.trace(), reference, cross)


def frechet_distance_of_features(features: Tensor, reference: Gaussian) -> float:
    """Fréchet distance of features [N, D] for any N >= 2, without an error estimate."""
    if len(features) <= features.shape[1]:
        return frechet_distance_low_rank(features, reference)
    return frechet_distance(FeatureMoments.of(features), reference)


def frechet_distance_low_rank(features: Tensor, reference: Gaussian) -> float:
    """Fréchet distance from the features [N, D]: exact for N <= D, where the covariance is singular.

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least two images, not {len(features)}")
    rows = features.double()
    mean = rows.mean(0)
    centered = (rows - mean) / (len(rows) - 1) ** 0.5
    # With S1 = A^T A the trace is the sum of the singular values of A R: no square root of a rounded zero.
    cross = torch.linalg.svdvals(centered @ reference.root).sum()
    return _frechet_formula(mean, centered.square().sum(), reference, cross)


def estimate_frechet_distance(
    features: Tensor, reference: Gaussian, blocks: int = JACKKNIFE_BLOCKS, *, limit: bool = True
) -> FrechetEstimate:
    """Fréchet distance of features [N, D] to a reference, with errors by the delete-a-block jackknife.

    The cost is dominated by eigenvalues of [D, D] matrices: once, and once per block. The extrapolation,
    which is computed if `limit` and if half the number of images exceeds the number of features, adds two,
    and one per block.

    Raises:
        ValueError: fewer than four images.
    """
    if len(features) < 4:
        raise ValueError(f"a distance and its error need at least four images, not {len(features)}")
    blocks = min(blocks, len(features) // 2) // 2 * 2
    limit = limit and len(features) > 2 * features.shape[1]
    distances = _BlockDistances(features, reference, blocks, fewest=blocks // 2 - 1 if limit else blocks - 1)
    all_blocks = range(blocks)
    value = distances.of_union(all_blocks)
    without = [
        distances.of_union([block for block in all_blocks if block != left_out]) for left_out in all_blocks
    ]
    return FrechetEstimate(
        value=value,
        stderr=jackknife_error(without),
        infinity=_infinite_limit(distances, value, without) if limit else None,
        singular=len(features) <= features.shape[1],
    )


def _infinite_limit(
    distances: "_BlockDistances", value: float, without: Sequence[float]
) -> tuple[float, float]:
    """The limit for N = infinity and its error, from the distances of all blocks and of all but one."""
    halves = [range(half, len(without), 2) for half in (0, 1)]
    by_half = [distances.of_union(half) for half in halves]
    limits = list[float]()
    for left_out, rest in enumerate(without):
        half, other = halves[left_out % 2], by_half[1 - left_out % 2]
        shrunk = [block for block in half if block != left_out]
        smaller = distances.of_union(shrunk) if shrunk else by_half[left_out % 2]
        limits.append(_extrapolate(rest, (smaller + other) / 2))
    return _extrapolate(value, sum(by_half) / 2), jackknife_error(limits)


def jackknife_error(without: Sequence[float]) -> float:
    """Jackknife standard error of a statistic, from its values with one of B blocks left out."""
    values = torch.tensor(without, dtype=torch.float64)
    blocks = len(values)
    return ((blocks - 1) / blocks * (values - values.mean()).square().sum()).sqrt().item()


def _extrapolate(full: float, half: float) -> float:
    """F of the line F(N) = F + c / N through F(N) and F(N / 2)."""
    return 2 * full - half


class _BlockDistances:
    """Distances of unions of blocks of images; the moments of each block are computed once."""

    def __init__(self, features: Tensor, reference: Gaussian, count: int, fewest: int) -> None:
        """Split into `count` blocks, of which every union has at least `fewest`."""
        self.reference = reference
        self.blocks = [features[number::count] for number in range(count)]
        smallest = min(len(block) for block in self.blocks) * fewest
        self.moments = (
            [FeatureMoments.of(block) for block in self.blocks] if smallest > features.shape[1] else None
        )

    def of_union(self, numbers: Sequence[int]) -> float:
        if self.moments is None:
            return frechet_distance_of_features(
                torch.cat([self.blocks[number] for number in numbers]), self.reference
            )
        total = self.moments[numbers[0]]
        for number in numbers[1:]:
            total = total + self.moments[number]
        return frechet_distance(total, self.reference)


def _frechet_formula(mean: Tensor, trace: Tensor, reference: Gaussian, cross: Tensor) -> float:
    difference = mean - reference.mean
    squared = difference @ difference + trace + reference.covariance.trace() - 2 * cross
    return max(0.0, squared.item())
