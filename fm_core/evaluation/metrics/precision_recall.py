"""Precision and recall of samples by nearest neighbours, and images that are there twice."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of Kynkäänniemi et al. (2019)."""
CHUNK_ROWS = 2_048


@dataclass(frozen=True)
class Coverage:
    """Shares of images near those of the other set, each with its binomial standard error."""

    precision: float
    """Share of samples in the ball of some real image to its k-th nearest real image."""
    precision_stderr: float
    recall: float
    """Share of real images in the ball of some sample to its k-th nearest sample."""
    recall_stderr: float


def precision_and_recall(samples: Tensor, real: Tensor, k: int = NEIGHBOURS) -> Coverage:
    """Precision and recall of features [N, D] against those of real images [M, D].

    Both depend on the numbers of images. Errors take the balls as given. Raises ValueError for k images
    or fewer in a set.
    """
    if min(len(samples), len(real)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images a side, not {len(samples)} and {len(real)}"
        )
    precision, recall = _inside(samples, real, k), _inside(real, samples, k)
    return Coverage(
        precision, _binomial_error(precision, len(samples)), recall, _binomial_error(recall, len(real))
    )


def duplicates(digests: Tensor) -> int:
    """Images that repeat an earlier one, from digests int64 [N] of their pixels."""
    return len(digests) - len(torch.unique(digests))


def _inside(points: Tensor, centres: Tensor, k: int) -> float:
    """The share of points [N, D] in the ball of some centre [M, D] to its k-th nearest other centre."""
    # The nearest is the centre itself, or a copy of it.
    radii = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in _distances(centres, centres)])
    inside = [(rows <= radii).any(1).double().sum() for rows in _distances(points, centres)]
    return (torch.stack(inside).sum() / len(points)).item()


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Distances float64 between rows, in chunks [n, M]."""
    b = b.double()
    return (torch.cdist(rows.double(), b) for rows in a.split(CHUNK_ROWS))


def _binomial_error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)
