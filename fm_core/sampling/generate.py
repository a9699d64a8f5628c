"""Images by number: image i is a function of (seed, i), whoever makes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.guidance import guided_velocity
from fm_core.method.ode import Solver, forwards_per_call, solve
from fm_core.method.types import Velocity
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.compiled_network import matmul_precision
from fm_core.storage import keyed_random


@dataclass(frozen=True)
class Draw:
    """What is asked of a model, save the numbers of the images."""

    solver: Solver
    seed: int
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    classes: Sequence[int] = ()
    """Classes in turn by image number; empty for random ones."""
    tf32: bool = False
    """Whether float32 products are TF32's on a GPU."""

    def check(self, model: Model) -> None:
        """Refuse what the model cannot do. Raises UserError."""
        if not model.conditional and (self.guidance != 1 or self.classes):
            asked = "sample.guidance" if self.guidance != 1 else "sample.classes"
            raise UserError(f"{asked}: the model was trained without classes (model.class_conditional)")
        # A file of an earlier version does not say how it was trained.
        if self.guidance != 1 and model.recipe.get("train", {}).get("label_dropout") == 0:
            raise UserError(
                "sample.guidance: the model always saw the class in training and knows no image without one; "
                "it wants one that was trained with train.label_dropout, e.g. 0.1"
            )
        strangers = [number for number in self.classes if not 0 <= number < model.classes]
        if strangers:
            raise UserError(f"sample.classes: {strangers[0]} is not in 0 .. {model.classes - 1}")

    def noise(self, model: Model, numbers: Sequence[int]) -> Tensor:
        """Where images start: float32 [n, *shape] on the CPU."""
        normal = keyed_random.normal(self.seed, "sample-noise", numbers, model.image_shape)
        return normal * model.objective.path.source_std

    def labels(self, model: Model, numbers: Sequence[int]) -> Tensor | None:
        """The class of each image, int64 [n]; None from an unconditional model."""
        if not model.conditional:
            return None
        if self.classes:
            return torch.tensor([self.classes[number % len(self.classes)] for number in numbers])
        return (keyed_random.uniform(self.seed, "sample-label", numbers, ()) * model.classes).long()

    def velocity(self, model: Model, labels: Tensor | None) -> Velocity:
        """The field that carries noise to images of these classes."""
        if labels is None or self.guidance == 1:
            return model.objective.velocity(model.network, labels)
        return guided_velocity(model.objective, model.network, labels, self.guidance)


@dataclass(frozen=True)
class GeneratedBatch:
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
    forwards: int
    """Forwards of the network in one evaluation of the field: two under guidance."""
    trajectory: Tensor | None = None
    """uint8 [T, n, channels, height, width], at the times asked for."""


def generate(
    model: Model,
    draw: Draw,
    first: int,
    count: int,
    device: torch.device,
    at: Sequence[float] | None = None,
) -> GeneratedBatch:
    """Solve the ODE for images first .. first + count - 1, as one batch; `at` are times of the trajectory.

    An adaptive solver chooses one step size for the whole batch, so callers cut batches at fixed
    numbers.
    """
    numbers = range(first, first + count)
    labels = draw.labels(model, numbers)
    velocity = draw.velocity(model, None if labels is None else labels.to(device))
    noise = draw.noise(model, numbers).to(device)
    with matmul_precision(draw.tf32):
        solution = solve(velocity, noise, model.objective.interval, draw.solver, at)
    images = model.quantizer.quantize(solution.x).cpu()
    way = None if solution.trajectory is None else model.quantizer.quantize(solution.trajectory).cpu()
    return GeneratedBatch(
        first=first,
        images=images,
        labels=labels,
        nfe=solution.nfe,
        accepted=solution.accepted,
        rejected=solution.rejected,
        forwards=forwards_per_call(velocity),
        trajectory=way,
    )


def time_grid(interval: tuple[float, float], count: int) -> list[float]:
    """Equally spaced times from the interval's start to its end."""
    start, end = interval
    return [start + (end - start) * i / (count - 1) for i in range(count - 1)] + [end]
