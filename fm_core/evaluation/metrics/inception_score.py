"""Inception Score: exp of the mean of KL(p(class | image) || p(class)) (Salimans et al. 2016)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.evaluation.metrics.frechet import JACKKNIFE_BLOCKS, jackknife_error


@dataclass(frozen=True)
class InceptionScore:
    """An Inception Score and its standard error."""

    value: float
    stderr: float


def inception_score(probabilities: Tensor, blocks: int = JACKKNIFE_BLOCKS) -> InceptionScore:
    """Inception Score over all images at once, independent of their order; error by jackknife.

    Args:
        probabilities: [N, classes], rows that sum to 1.
        blocks: image i is in block i mod `blocks`.

    Raises:
        ValueError: fewer than two images.
    """
    if len(probabilities) < 2:
        raise ValueError(f"an Inception Score needs at least two images, not {len(probabilities)}")
    p = probabilities.double()
    blocks = min(blocks, len(p))
    number = torch.arange(len(p), device=p.device) % blocks
    counts = torch.bincount(number, minlength=blocks).double()
    totals = torch.zeros(blocks, p.shape[1], dtype=p.dtype, device=p.device).index_add_(0, number, p)
    per_image = torch.xlogy(p, p).sum(1)
    sums = torch.zeros(blocks, dtype=p.dtype, device=p.device).index_add_(0, number, per_image)

    def score(count: Tensor, total: Tensor, negentropy: Tensor) -> float:
        mean = total / count
        return math.exp((negentropy / count - torch.xlogy(mean, mean).sum()).item())

    count, total, negentropies = counts.sum(), totals.sum(0), sums.sum()
    without = [score(count - counts[b], total - totals[b], negentropies - sums[b]) for b in range(blocks)]
    return InceptionScore(score(count, total, negentropies), jackknife_error(without))
