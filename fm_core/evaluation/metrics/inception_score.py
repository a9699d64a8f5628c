"""Inception Score: exp of the mean of KL(p(class | image) || p(class)) (Salimans et al. 2016)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.evaluation.metrics.sampling_error import SamplingError, heavy_tails


@dataclass(frozen=True)
class InceptionScore:
    """An Inception Score and its standard error."""

    value: float
    stderr: float
    """Standard deviation over independent sets of the same number of images."""
    unreliable: str | None = None
    """Why the error is unreliable; None if it is reliable."""


def inception_score(probabilities: Tensor) -> InceptionScore:
    """Inception Score over all images at once, independent of their order.

    The standard error follows from the error of the logarithm of the score, by `SamplingError`. There,
    L(x) is KL(p(class | x) || p(class)), and φ(x, y) is minus the sum over classes of
    (p(class | x) - p(class)) (p(class | y) - p(class)) / p(class).

    Args:
        probabilities: [N, classes], rows that sum to 1.

    Raises:
        ValueError: fewer than two images.
    """
    count = len(probabilities)
    if count < 2:
        raise ValueError(f"an Inception Score needs at least two images, not {count}")
    p = probabilities.double()
    mean = p.mean(0)
    divergences = (torch.xlogy(p, p) - torch.xlogy(p, mean)).sum(1)
    value = divergences.mean().exp()
    centered = (p - mean) / mean.clamp_min(torch.finfo(p.dtype).tiny).sqrt()
    second = (centered.T @ centered / count).square().sum() / (2 * count**2)
    jackknife = divergences.var().item() / count
    error = SamplingError.of(jackknife, second.item(), heavy_tails(divergences))
    return InceptionScore(value.item(), value.item() * error.stderr, error.unreliable)
