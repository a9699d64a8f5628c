"""Bits per dimension of images, by uniform dequantization (App. C and eqs. 36, 37).

With u uniform in the bin of each pixel, log p(x + u) is in expectation a lower bound on the log-probability
of the pixels, and log (1/K) sum_k p(x + u_k) is a tighter one, provided that each log-density is exact. The
noise of Hutchinson's estimator enters the exponential and biases the K-sample bound favorably; with fresh
probes for every draw, this bias can be as large as the entire gain of the bound. Therefore all K draws share
the same probes, and the primary reported value uses K = 1.
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

    single_sample: Tensor  # [N] float64: K = 1, from draw 0
    k_sample: Tensor  # [N] float64: all K draws; equals `single_sample` when K = 1
    per_probe: Tensor  # [N, P] float64: K = 1, from each probe alone
    k: int
    nfe: int  # network evaluations per image, summed over the K draws


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
        pixels: uint8 [N, ...], intensity levels 0 .. quantizer.levels - 1.
        quantizer: the quantizer that the model was trained with.
        draws: uniform in [0, 1), [K, N, ...]; draw 0 gives the K = 1 value.
        interval: the objective's interval of t.
        solver: the ODE solver.
        divergence: Exact() or Hutchinson(probes), shared by all draws.
        source_std: the path's source_std.

    Raises:
        ValueError: `draws` is not of shape [K, *pixels.shape].
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
        single_sample=bits(results[0].log_density),
        k_sample=bits(log_mean_exp(torch.stack([result.log_density for result in results]))),
        per_probe=bits(results[0].per_probe),
        k=len(results),
        nfe=sum(result.nfe for result in results),
    )


@dataclass(frozen=True)
class BitsSummary:
    """Mean bits/dim over a set of images."""

    value: float  # mean over the images
    stderr: float | None  # standard error of the mean; None for a single image
    images: int
    probe_std: float | None  # of one image's single-probe value; None with fewer than two probes


def summarize(bits: Tensor, per_probe: Tensor | None = None) -> BitsSummary:
    """Mean and standard error of bits/dim [N], and standard deviation over probes of `per_probe` [N, P]."""
    images = bits.shape[0]
    stderr = float(bits.std() / math.sqrt(images)) if images > 1 else None
    several = per_probe is not None and per_probe.shape[1] > 1
    probe_std = float(per_probe.var(dim=1).mean().sqrt()) if several and per_probe is not None else None
    return BitsSummary(float(bits.mean()), stderr, images, probe_std)
