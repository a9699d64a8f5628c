"""Bits per dimension of images of a data set, in batches that depend on the numbers of their images alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.config import LikelihoodSection
from fm_core.method.bits_per_dim import BitsSummary, bits_per_dim, summarize
from fm_core.method.divergence import Hutchinson
from fm_core.method.ode import Solver
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.compiled_network import matmul_precision
from fm_core.storage import keyed_random

PROBES = 2
"""Independent Rademacher probes of an image: their difference measures what the estimate owes to them."""
TIGHTER = 0.1
"""Tolerances of the check, as a share of those that are checked."""


@dataclass(frozen=True)
class SolverCheck:
    """What tighter tolerances change of the first images, in bits/dim."""

    images: int
    mean: float
    """Mean of tight - usual."""
    largest: float
    """Largest |tight - usual| of an image."""


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
    check: SolverCheck | None
    """None where no image was solved again."""


def batch_bits(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    numbers: Sequence[int],
    settings: LikelihoodSection,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Score images uint8 [N, C, H, W], image i with draws and probes of (seed, i), in float32.

    A conditional model is given the labels int64 [N]. The result, image by image: `image` int64 [N], `bits`
    and `k_sample` float64 [N], `per_probe` float64 [N, P], `nfe` int64 [N], over all draws.
    """
    shape = model.image_shape
    draws = [
        keyed_random.uniform(seed, f"likelihood-draw-{draw}", numbers, shape)
        for draw in range(settings.draws)
    ]
    probes = [
        keyed_random.rademacher(seed, f"likelihood-probe-{probe}", numbers, shape) for probe in range(PROBES)
    ]
    velocity = model.objective.velocity(model.network, labels.to(device) if model.conditional else None)
    with matmul_precision():
        bits = bits_per_dim(
            velocity,
            pixels.to(device),
            model.quantizer,
            torch.stack(draws).to(device),
            model.objective.interval,
            Solver("dopri5", rtol=settings.rtol, atol=settings.atol),
            Hutchinson(torch.stack(probes).to(device)),
            model.objective.path.source_std,
        )
    return {
        "image": torch.tensor(list(numbers)),
        "bits": bits.first.cpu(),
        "k_sample": bits.k_sample.cpu(),
        "per_probe": bits.per_probe.cpu(),
        "nfe": torch.full((len(numbers),), bits.nfe),
    }


def tightened(settings: LikelihoodSection) -> LikelihoodSection:
    """The settings that the solver is checked by: one draw, a tenth of the tolerances."""
    tight = {"rtol": settings.rtol * TIGHTER, "atol": settings.atol * TIGHTER}
    return settings.model_copy(update={**tight, "draws": 1})


def gathered(
    parts: Iterable[Mapping[str, Tensor]], checks: Iterable[Mapping[str, Tensor]], draws: int
) -> Likelihood:
    """Put batches together, in the order of their images; `checks` are those of tighter tolerances."""
    whole = _joined(parts)
    single, k_sample = whole["bits"], whole["k_sample"]
    return Likelihood(
        headline=summarize(single, whole["per_probe"]),
        k_sample=summarize(k_sample) if draws > 1 else None,
        k=draws,
        nfe=whole["nfe"].double().mean().item() / draws,
        check=_check(single, _joined(checks)),
    )


def _joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    listed = list(parts)
    return {name: torch.cat([part[name] for part in listed]) for name in listed[0]} if listed else {}


def _check(usual: Tensor, tight: Mapping[str, Tensor]) -> SolverCheck | None:
    if not tight:
        return None
    change = tight["bits"] - usual[tight["image"]]
    return SolverCheck(len(change), change.mean().item(), change.abs().amax().item())
