"""Image generation with per-index seeding: image i is a function of (seed, i), on any rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.guidance import guided_velocity
from fm_core.method.ode import Solution, Solver, forwards_per_call, solve
from fm_core.method.types import NoiseSource, Velocity
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.compiled_network import matmul_precision
from fm_core.sampling.solver_check import check_solver
from fm_core.storage.keyed_random import CPU, Domain, KeyedRandom, Purpose


@dataclass(frozen=True)
class Draw:
    """A sampling request except for the image indices: solver, seed, guidance, classes."""

    solver: Solver
    seed: int
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    classes: Sequence[int] = ()
    """Classes assigned to image indices in turn; empty for random ones."""
    tf32: bool = False
    """Whether float32 products and convolutions use TF32 on a GPU."""

    def check(self, model: Model) -> None:
        """Check the request against the model. Raises UserError for what the model cannot do."""
        if not model.conditional and (self.guidance != 1 or self.classes):
            key = "sample.guidance" if self.guidance != 1 else "sample.classes"
            raise UserError(f"{key}: the model was trained without classes (model.class_conditional)")
        # Files of earlier versions do not record label dropout.
        if self.guidance != 1 and model.recipe.get("train", {}).get("label_dropout") == 0:
            raise UserError(
                "sample.guidance: the model was trained without label dropout, so it has no unconditional "
                "field; use one that was trained with train.label_dropout, e.g. 0.1"
            )
        unknown = [number for number in self.classes if not 0 <= number < model.classes]
        if unknown:
            raise UserError(f"sample.classes: {unknown[0]} is not in 0 .. {model.classes - 1}")
        check_solver(self.solver, model.objective, model.coupling)

    def noise(self, model: Model, indices: Sequence[int], device: torch.device = CPU) -> Tensor:
        """The noise that images start from: float32 [n, *shape] on the device."""
        normal = self._random(model).normal(Purpose.NOISE, indices, model.image_shape, device)
        return normal * model.objective.path.source_std

    def step_noise(self, model: Model, indices: Sequence[int], device: torch.device = CPU) -> NoiseSource:
        """The noise of each step of a stochastic solver: a function of (seed, image index, step)."""
        random = self._random(model)
        positions = torch.tensor(indices, dtype=torch.int64, device=device)
        return lambda step: random.normal(
            Purpose.STEP_NOISE, positions, model.image_shape, device, index=step
        )

    def labels(self, model: Model, indices: Sequence[int]) -> Tensor | None:
        """The class of each image, int64 [n]; None for an unconditional model."""
        if not model.conditional:
            return None
        if self.classes:
            return torch.tensor([self.classes[index % len(self.classes)] for index in indices])
        return (self._random(model).uniform(Purpose.CLASS, indices) * model.classes).long()

    def _random(self, model: Model) -> KeyedRandom:
        return KeyedRandom(model.generator, self.seed, Domain.SAMPLES)

    def solve(
        self,
        model: Model,
        velocity: Velocity,
        indices: Sequence[int],
        device: torch.device = CPU,
        at: Sequence[float] | None = None,
        solver: Solver | None = None,
    ) -> Solution:
        """Transport the noise of these indices by the velocity; `solver` replaces that of the request.

        Raises as `fm_core.method.ode.solve`.
        """
        return solve(
            velocity,
            self.noise(model, indices, device),
            model.objective.interval,
            solver or self.solver,
            at,
            path=model.objective.path,
            noise=self.step_noise(model, indices, device),
        )

    def velocity(self, model: Model, labels: Tensor | None) -> Velocity:
        """The velocity field that transports noise to images of these classes."""
        if labels is None or self.guidance == 1:
            return model.objective.velocity(model.network, labels)
        return guided_velocity(model.objective, model.network, labels, self.guidance)


@dataclass(frozen=True)
class GeneratedBatch:
    """Images with indices first, first + 1, ... and their solver statistics."""

    first: int
    images: Tensor
    """uint8 [n, channels, height, width]."""
    labels: Tensor | None
    """int64 [n]: the requested classes; None for an unconditional model."""
    nfe: int
    """Network evaluations (NFE) per image."""
    accepted: int | None
    rejected: int | None
    forwards: int
    """Network evaluations per evaluation of the field: two with guidance."""
    trajectory: Tensor | None = None
    """uint8 [T, n, channels, height, width], at the requested times."""


def generate(
    model: Model,
    draw: Draw,
    first: int,
    count: int,
    device: torch.device,
    at: Sequence[float] | None = None,
) -> GeneratedBatch:
    """Solve the ODE for images first .. first + count - 1 as one batch; `at` are times of the trajectory.

    An adaptive solver chooses one step size for the whole batch, so callers must split batches at fixed
    indices.
    """
    indices = range(first, first + count)
    labels = draw.labels(model, indices)
    velocity = draw.velocity(model, None if labels is None else labels.to(device))
    with matmul_precision(draw.tf32):
        solution = draw.solve(model, velocity, indices, device, at)
    images = model.quantizer.quantize(solution.x).cpu()
    trajectory = None if solution.trajectory is None else model.quantizer.quantize(solution.trajectory).cpu()
    return GeneratedBatch(
        first=first,
        images=images,
        labels=labels,
        nfe=solution.nfe,
        accepted=solution.accepted,
        rejected=solution.rejected,
        forwards=forwards_per_call(velocity),
        trajectory=trajectory,
    )


def time_grid(interval: tuple[float, float], count: int) -> list[float]:
    """`count` equally spaced times from the interval's start to its end."""
    start, end = interval
    return [start + (end - start) * i / (count - 1) for i in range(count - 1)] + [end]
