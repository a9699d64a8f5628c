"""Bits per dimension of images, by uniform dequantisation (the paper's App. C and eqs. 36, 37).

With u uniform in the bin of each pixel, log p(x + u) is on average a lower bound on the log-probability of
the pixels, and log (1/K) sum_k p(x + u_k) a tighter one: but only as far as each log-density is exact.
Hutchinson's noise enters the exponential and makes the K-sample number look better than it is, by as much as
the whole gain when every draw has a fresh probe. So all K draws share the probes, and the headline is K = 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.method.dequantization import Quantizer
from fm_core.method.divergence import Divergence
from fm_core.method.likelihood import log_density, log_mean_exp
from fm_core.method.ode import Solver
from fm_core.method.types import Interval, Velocity


@dataclass(frozen=True)
class ImageBits:
    """Bits/dim of each image of a batch."""

    first: Tensor  # [N] float64: K = 1, the headline
    k_sample: Tensor  # [N] float64: all K draws; equals `first` when K = 1
    per_probe: Tensor  # [N, P] float64: K = 1 by each probe alone
    k: int
    nfe: int  # forwards of the network for each image, over all K draws


def bits_per_dim(
    velocity: Velocity,
    pixels: Tensor,
    quantizer: Quantizer,
    draws: Tensor,
    interval: Interval,
    solver: Solver,
    divergence: Divergence,
    source_std: float = 1.0,
) -> ImageBits:
    """Bits/dim of uint8 images under the model.

    Args:
        velocity: u(t, x).
        pixels: uint8 [N, ...], grey levels 0 .. quantizer.levels - 1.
        quantizer: the map the model was trained with.
        draws: uniform in [0, 1), [K, N, ...]; draw 0 is the headline's.
        interval: the objective's.
        solver: the method.
        divergence: Exact() or Hutchinson(probes), shared by all draws.
        source_std: the path's.

    Raises:
        ValueError: the draws do not have the shape [K, *pixels.shape].
    """
    if draws.shape[1:] != pixels.shape or draws.shape[0] < 1:
        raise ValueError(f"draws must be [K, *{list(pixels.shape)}], not {list(draws.shape)}")
    results = [
        log_density(velocity, quantizer.dequantize(pixels, u), interval, solver, divergence, source_std)
        for u in draws
    ]
    dimension = pixels[0].numel()

    def bits(log_densities: Tensor) -> Tensor:
        return -log_densities / (dimension * math.log(2)) + quantizer.bits_offset

    return ImageBits(
        first=bits(results[0].log_density),
        k_sample=bits(log_mean_exp(torch.stack([result.log_density for result in results]))),
        per_probe=bits(results[0].per_probe),
        k=len(results),
        nfe=sum(result.nfe for result in results),
    )


@dataclass(frozen=True)
class BitsSummary:
    """Bits/dim over a set of images."""

    value: float  # mean over the images
    stderr: float | None  # of that mean; None for a single image
    images: int
    probe_std: float | None  # of one image's value by one probe; None unless there were two probes or more


def summarize(bits: Tensor, per_probe: Tensor | None = None) -> BitsSummary:
    """Mean, standard error and probe deviation of bits/dim [N] and, if wanted, those by each probe [N, P]."""
    images = bits.shape[0]
    stderr = float(bits.std() / math.sqrt(images)) if images > 1 else None
    several = per_probe is not None and per_probe.shape[1] > 1
    probe_std = float(per_probe.var(dim=1).mean().sqrt()) if several and per_probe is not None else None
    return BitsSummary(float(bits.mean()), stderr, images, probe_std)
