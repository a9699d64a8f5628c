"""Memorization: whether samples are nearer to the training images than validation images are.

Validation images come from the data distribution and were not used in training. A model that generalizes
should reproduce the distribution of their distances to the nearest training image. Distances can be measured
in pixels or in features.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 0.01
"""Fraction of the validation images that are nearer to a training image than the near-copy threshold."""
LEAST_NEAR = 5
"""Minimum number of validation images below the near-copy threshold; with fewer, its error is unreliable."""
FEW_VALIDATION = f"fewer than {LEAST_NEAR} validation images set the threshold"
CHUNK_ROWS = 1_024


@dataclass(frozen=True)
class Share:
    """A fraction between 0 and 1 with its standard error over samples and validation images."""

    value: float
    stderr: float
    expected: float
    """The fraction if samples are as far from the training images as validation images are."""
    unreliable: str | None = None


@dataclass(frozen=True)
class Memorization:
    """Distances to the nearest training image, for samples and for validation images."""

    samples: tuple[float, float]
    """Mean distance over the samples, and its standard error."""
    held_out: tuple[float, float]
    """Mean distance over the validation images, and its standard error."""
    nearer: Share
    """Probability that a sample is nearer than a validation image."""
    near_copies: Share
    """Fraction of the samples that are near-copies."""


def nearest_distances(queries: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    """Root mean square difference between each query and its nearest image, float64 [N].

    Args:
        queries: [N, ...], any dtype; images or features.
        blocks: the other images, in blocks [M, ...]; at most one block and its distances to a thousand
            queries are in memory.
    """
    rows = queries.flatten(1).double()
    nearest = torch.full((len(rows),), math.inf, dtype=torch.float64, device=rows.device)
    for block in blocks:
        others = block.to(rows.device).flatten(1).double()
        for first in range(0, len(rows), CHUNK_ROWS):
            part = slice(first, first + CHUNK_ROWS)
            distances = torch.cdist(rows[part], others).amin(1)
            nearest[part] = torch.minimum(nearest[part], distances)
    return nearest / rows.shape[1] ** 0.5


def memorization(samples: Tensor, held_out: Tensor) -> Memorization:
    """Compare the distances to the nearest training image of samples [N] and of validation images [M].

    The errors cover the choice of samples and validation images, with the training images held fixed.
    `nearer` is the Mann-Whitney statistic, with the error of DeLong et al. (1988).

    Raises:
        ValueError: a set has fewer than two images.
    """
    if min(len(samples), len(held_out)) < 2:
        raise ValueError(f"two images per set are needed, not {len(samples)} and {len(held_out)}")
    ours, theirs = samples.double().cpu(), held_out.double().cpu()
    return Memorization(_mean(ours), _mean(theirs), _nearer(ours, theirs), _near_copies(ours, theirs))


def _mean(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def _nearer(ours: Tensor, theirs: Tensor) -> Share:
    of_ours, of_theirs = 1 - _rank(ours, theirs), _rank(theirs, ours)
    variance = of_ours.var().item() / len(ours) + of_theirs.var().item() / len(theirs)
    return Share(of_ours.mean().item(), variance**0.5, expected=0.5)


def _rank(values: Tensor, others: Tensor) -> Tensor:
    """Fraction of the others that are below each value; ties count one half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to).double() / (2 * len(others))


def _near_copies(ours: Tensor, theirs: Tensor) -> Share:
    ordered, count = theirs.sort().values, len(theirs)
    near = max(1, int(NEAR * count))

    def share(position: int) -> float:
        return (ours < ordered[min(max(position, 1), count) - 1]).double().mean().item()

    value, expected = share(near), near / (count + 1)
    # The threshold is a quantile over validation images, so it varies with them, and so does the fraction.
    spread = (expected * (1 - expected) * count) ** 0.5
    step = max(1, round(spread))
    slope = (share(near + step) - share(near - step)) / (min(near + step, count) - max(near - step, 1))
    variance = value * (1 - value) / len(ours) + (slope * spread) ** 2
    return Share(value, variance**0.5, expected, FEW_VALIDATION if near < LEAST_NEAR else None)
