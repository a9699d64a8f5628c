"""Images by number: image i is a function of (seed, i), whoever makes it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.method import keyed_random
from fm_core.method.solve import Solver, solve
from fm_core.sampling.model import Model


@dataclass(frozen=True)
class Batch:
    """Images first, first + 1, ... and what they cost."""

    first: int
    images: Tensor
    """uint8 [n, channels, height, width]."""
    labels: Tensor | None
    """int64 [n]: the classes asked for; None from an unconditional model."""
    nfe: int
    """Forwards of the network for each image."""
    accepted: int | None
    rejected: int | None


def generate(model: Model, solver: Solver, seed: int, first: int, count: int, device: torch.device) -> Batch:
    """Solve the ODE for images first .. first + count - 1, as one batch.

    An adaptive solver chooses one step size for the whole batch, so callers cut batches at fixed
    numbers.
    """
    numbers = range(first, first + count)
    noise = keyed_random.normal(seed, "sample-noise", numbers, model.image_shape)
    labels = None
    if model.conditional:
        labels = (keyed_random.uniform(seed, "sample-label", numbers, ()) * model.classes).long()
    path, objective = model.objective.path, model.objective
    velocity = objective.velocity(model.network, None if labels is None else labels.to(device))
    solution = solve(velocity, noise.to(device) * path.source_std, objective.interval, solver)
    images = model.quantiser.quantise(solution.x).cpu()
    return Batch(first, images, labels, solution.nfe, solution.accepted, solution.rejected)
