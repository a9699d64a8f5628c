"""Bits per dimension of images of a data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.config import LikelihoodSection
from fm_core.method import keyed_random
from fm_core.method.bits import BitsSummary, ImageBits, bits_per_dim, summarise
from fm_core.method.divergence import Hutchinson
from fm_core.method.solve import Solver
from fm_core.sampling.model import Model

PROBES = 2
"""Independent Rademacher probes of an image: their difference measures what the estimate owes to them."""


@dataclass(frozen=True)
class Likelihood:
    """Bits/dim over a set of images."""

    headline: BitsSummary
    """With one dequantisation draw: an upper bound on the true value, in expectation."""
    k_sample: BitsSummary | None
    """With all K draws, which share the probes; None for K = 1."""
    k: int
    nfe: float
    """Forwards of the network for each image and draw."""


def data_set_bits(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    settings: LikelihoodSection,
    seed: int,
    device: torch.device,
    on_images: Callable[[int], None],
) -> Likelihood:
    """Score images uint8 [N, C, S, S], image i with draws and probes of (seed, i).

    A conditional model is given the labels int64 [N]. `on_images` hears how many are finished.
    """
    batches: list[ImageBits] = []
    forwards = 0
    for first in range(0, len(pixels), settings.batch):
        numbers = range(first, min(first + settings.batch, len(pixels)))
        part = slice(numbers.start, numbers.stop)
        batches.append(_batch(model, pixels[part], labels[part], numbers, settings, seed, device))
        forwards += batches[-1].nfe * len(numbers)
        on_images(numbers.stop)
    single = torch.cat([batch.first for batch in batches])
    k_sample = torch.cat([batch.k_sample for batch in batches])
    return Likelihood(
        headline=summarise(single, torch.cat([batch.per_probe for batch in batches])),
        k_sample=summarise(k_sample) if settings.draws > 1 else None,
        k=settings.draws,
        nfe=forwards / (len(pixels) * settings.draws),
    )


def _batch(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    numbers: Sequence[int],
    settings: LikelihoodSection,
    seed: int,
    device: torch.device,
) -> ImageBits:
    shape = model.image_shape
    draws = [
        keyed_random.uniform(seed, f"likelihood-draw-{draw}", numbers, shape)
        for draw in range(settings.draws)
    ]
    probes = [
        keyed_random.rademacher(seed, f"likelihood-probe-{probe}", numbers, shape) for probe in range(PROBES)
    ]
    velocity = model.objective.velocity(model.network, labels.to(device) if model.conditional else None)
    bits = bits_per_dim(
        velocity,
        pixels.to(device),
        model.quantiser,
        torch.stack(draws).to(device),
        model.objective.interval,
        Solver("dopri5", rtol=settings.rtol, atol=settings.atol),
        Hutchinson(torch.stack(probes).to(device)),
        model.objective.path.source_std,
    )
    return ImageBits(bits.first.cpu(), bits.k_sample.cpu(), bits.per_probe.cpu(), bits.k, bits.nfe)
