"""Bits per dimension of a data set, in batches whose results depend only on the indices of their images."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fm_core.config import LikelihoodSection
from fm_core.method.bits_per_dim import BitsSummary, bits_per_dim, summarize
from fm_core.method.divergence import Hutchinson
from fm_core.method.ode import Solver
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.compiled_network import matmul_precision
from fm_core.storage.atomic_files import write_text
from fm_core.storage.keyed_random import Domain, KeyedRandom, Purpose

PROBES = 2
"""Independent Rademacher probes per image. The difference between them measures the estimator's variance."""
TOLERANCE_FACTOR = 0.1
"""Factor by which the solver check multiplies the configured tolerances."""


@dataclass(frozen=True)
class SolverCheck:
    """Effect of tighter tolerances on the first images, in bits/dim."""

    images: int
    mean: float
    """Mean difference, tight - default."""
    largest: float
    """Largest |tight - default| over the images."""


@dataclass(frozen=True)
class Likelihood:
    """Bits/dim over a set of images."""

    single_sample: BitsSummary
    """Bits/dim with one dequantization draw: in expectation an upper bound on the true value."""
    k_sample: BitsSummary | None
    """Bits/dim with all K draws, which share their probes; None for K = 1."""
    k: int
    nfe: float
    """Network evaluations per image and draw."""
    check: SolverCheck | None
    """Result of the solver check; None if no image was solved again."""


def batch_bits(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    numbers: Sequence[int],
    settings: LikelihoodSection,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Bits/dim of images uint8 [N, C, H, W], in float32; draws and probes of image i are keyed by (seed, i).

    `numbers` are the indices of the images in the data set. A class-conditional model receives the labels
    int64 [N].

    Returns:
        For all images: `image` int64 [N] (the indices), `bits` and `k_sample` float64 [N], `per_probe`
        float64 [N, P], and `nfe` int64 [N], summed over all draws.
    """
    shape = model.image_shape
    random = KeyedRandom(model.generator, seed, Domain.LIKELIHOOD)
    draws = [
        random.uniform(Purpose.DEQUANTIZATION, numbers, shape, device, draw) for draw in range(settings.draws)
    ]
    probes = [random.sign(Purpose.PROBE, numbers, shape, device, probe) for probe in range(PROBES)]
    velocity = model.objective.velocity(model.network, labels.to(device) if model.conditional else None)
    with matmul_precision():
        bits = bits_per_dim(
            velocity,
            pixels.to(device),
            model.quantizer,
            torch.stack(draws),
            model.objective.interval,
            Solver("dopri5", rtol=settings.rtol, atol=settings.atol),
            Hutchinson(torch.stack(probes)),
            model.objective.path.source_std,
        )
    return {
        "image": torch.tensor(list(numbers)),
        "bits": bits.single_sample.cpu(),
        "k_sample": bits.k_sample.cpu(),
        "per_probe": bits.per_probe.cpu(),
        "nfe": torch.full((len(numbers),), bits.nfe),
    }


def tighter_settings(settings: LikelihoodSection) -> LikelihoodSection:
    """Return the settings of the solver check: one draw, and tolerances ten times smaller."""
    tolerances = {"rtol": settings.rtol * TOLERANCE_FACTOR, "atol": settings.atol * TOLERANCE_FACTOR}
    return settings.model_copy(update={**tolerances, "draws": 1})


def combine(
    parts: Iterable[Mapping[str, Tensor]], checks: Iterable[Mapping[str, Tensor]], draws: int
) -> Likelihood:
    """Combine batches, given in the order of their images; `checks` are batches with tighter tolerances."""
    images = _concatenate(parts)
    single_sample, k_sample = images["bits"], images["k_sample"]
    return Likelihood(
        single_sample=summarize(single_sample, images["per_probe"]),
        k_sample=summarize(k_sample) if draws > 1 else None,
        k=draws,
        nfe=images["nfe"].double().mean().item() / draws,
        check=_solver_check(single_sample, _concatenate(checks)),
    )


def _concatenate(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    batches = list(parts)
    if not batches:
        return {}
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _solver_check(default: Tensor, tight: Mapping[str, Tensor]) -> SolverCheck | None:
    if not tight:
        return None
    difference = tight["bits"] - default[tight["image"]]
    return SolverCheck(len(difference), difference.mean().item(), difference.abs().amax().item())


def write_bits(parts: Sequence[Mapping[str, Tensor]], path: Path) -> None:
    """Write one JSON line with the bits/dim of each image."""
    lines = list[str]()
    for part in parts:
        rows = zip(*(part[name].tolist() for name in ("image", "bits", "k_sample", "per_probe")), strict=True)
        for image, bits, k_sample, per_probe in rows:
            record = {"image": image, "bits": bits, "k_sample": k_sample, "per_probe": per_probe}
            lines.append(json.dumps(record))
    write_text(path, "\n".join(lines) + "\n")
