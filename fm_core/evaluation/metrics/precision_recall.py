"""Precision and recall by k-nearest neighbors (Kynkäänniemi et al. 2019), and duplicate images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBORS = 3
"""k, as in Kynkäänniemi et al. (2019)."""
CHUNK_ROWS = 2_048


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall, each with its binomial standard error."""

    precision: float
    """Fraction of samples inside the ball of some real image that reaches to its k-th nearest real image."""
    precision_stderr: float
    recall: float
    """Fraction of real images inside the ball of some sample that reaches to its k-th nearest sample."""
    recall_stderr: float


def precision_and_recall(samples: Tensor, real: Tensor, k: int = NEIGHBORS) -> PrecisionRecall:
    """Precision and recall of features [N, D] against those of real images [M, D].

    Both depend on the numbers of images. The errors treat the balls as fixed.

    Raises:
        ValueError: a set has at most k images.
    """
    if min(len(samples), len(real)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images per set, not {len(samples)} and {len(real)}"
        )
    precision, recall = _fraction_covered(samples, real, k), _fraction_covered(real, samples, k)
    return PrecisionRecall(
        precision, _binomial_error(precision, len(samples)), recall, _binomial_error(recall, len(real))
    )


def duplicates(digests: Tensor) -> int:
    """Number of images that repeat an earlier one, from digests int64 [N] of their pixels."""
    return len(digests) - len(torch.unique(digests))


def _fraction_covered(points: Tensor, centers: Tensor, k: int) -> float:
    """Fraction of points [N, D] in the ball of some center [M, D] to its k-th nearest other center."""
    # The nearest is the center itself, or a copy of it.
    radii = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in _distances(centers, centers)])
    inside = [(rows <= radii).any(1).double().sum() for rows in _distances(points, centers)]
    return (torch.stack(inside).sum() / len(points)).item()


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Pairwise distances, float64, in chunks [n, M] of the rows of a."""
    b = b.double()
    return (torch.cdist(rows.double(), b) for rows in a.split(CHUNK_ROWS))


def _binomial_error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)
