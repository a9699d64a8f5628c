"""Bits per dimension of images of a data set."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.config import LikelihoodSection
from fm_core.method import keyed_random
from fm_core.method.divergence import Hutchinson
from fm_core.method.likelihood import log_density, log_mean_exp
from fm_core.method.solve import Solver
from fm_core.sampling.model import Model

PROBES = 2
"""Two independent Rademacher probes an image: their difference measures what the estimate owes to them."""


@dataclass(frozen=True)
class BitsPerDim:
    """Bits/dim over a set of images."""

    value: float
    """Mean over images with one dequantisation draw: an upper bound in expectation."""
    stderr: float
    """Standard error of that mean over images."""
    images: int
    draws: int
    """K of `importance_weighted`."""
    importance_weighted: float | None
    """Mean with K draws that share the probes; None for K = 1."""
    probe_std: float
    """Standard deviation, in bits/dim, that the probes give one image's estimate."""
    nfe: float
    """Forwards of the network for each image and draw."""


def bits_per_dim(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    settings: LikelihoodSection,
    seed: int,
    device: torch.device,
    on_images: Callable[[int], None],
) -> BitsPerDim:
    """Score images uint8 [N, C, S, S], image i with draws and probes of (seed, i).

    A conditional model is given the labels int64 [N]. `on_images` hears how many are finished.
    """
    bits: list[Tensor] = []  # [n, K, probes] for each batch
    forwards = 0
    for first in range(0, len(pixels), settings.batch):
        part = slice(first, min(first + settings.batch, len(pixels)))
        batch = [
            _batch(model, pixels[part], labels[part], first, draw, settings, seed, device)
            for draw in range(settings.draws)
        ]
        bits.append(torch.stack([one for one, _ in batch], dim=1))
        forwards += sum(nfe for _, nfe in batch) * (part.stop - part.start)
        on_images(part.stop)
    all_bits = torch.cat(bits)
    single = all_bits[:, 0].mean(-1)
    probe_variance = all_bits[:, 0].var(-1, unbiased=True).mean() / PROBES
    return BitsPerDim(
        value=single.mean().item(),
        stderr=(single.std(unbiased=True) / math.sqrt(len(single))).item(),
        images=len(single),
        draws=settings.draws,
        importance_weighted=_importance_weighted(model, all_bits) if settings.draws > 1 else None,
        probe_std=probe_variance.sqrt().item(),
        nfe=forwards / (len(pixels) * settings.draws),
    )


def _batch(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    first: int,
    draw: int,
    settings: LikelihoodSection,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Bits/dim [n, probes] of images first, first + 1, ... with one dequantisation draw; and the NFE."""
    numbers, shape = range(first, first + len(pixels)), model.image_shape
    dither = keyed_random.uniform(seed, f"likelihood-dequantise-{draw}", numbers, shape)
    # The probes are keyed by the image alone: fresh ones for each draw would make K draws look better.
    probes = torch.stack(
        [keyed_random.rademacher(seed, f"probe-{number}", numbers, shape) for number in range(PROBES)]
    )
    x1 = model.quantiser.dequantise(pixels, dither).to(device)
    velocity = model.objective.velocity(model.network, labels.to(device) if model.conditional else None)
    result = log_density(
        velocity,
        x1,
        model.objective.interval,
        Solver("dopri5", rtol=settings.rtol, atol=settings.atol),
        Hutchinson(probes.to(device)),
        model.objective.path.source_std,
    )
    dimension = math.prod(shape)
    bits = -result.per_probe.cpu() / (dimension * math.log(2)) + model.quantiser.bits_offset
    return bits, result.nfe


def _importance_weighted(model: Model, bits: Tensor) -> float:
    """Bits/dim of log (1/K) sum_k p(x + u_k), from bits [N, K, probes]."""
    dimension, offset = math.prod(model.image_shape), model.quantiser.bits_offset
    log_p = -(bits.mean(-1) - offset) * dimension * math.log(2)
    return (-log_mean_exp(log_p.T) / (dimension * math.log(2)) + offset).mean().item()
