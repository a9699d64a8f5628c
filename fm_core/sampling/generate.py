"""Image generation with per-index seeding: image i is a function of (seed, i), on any rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.guidance import autoguided_velocity, guided_velocity
from fm_core.method.ode import Solution, Solver, forwards_per_call, solve
from fm_core.method.types import Interval, NoiseSource, Velocity
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.compiled_network import matmul_precision
from fm_core.sampling.solver_check import check_guidance, check_solver
from fm_core.storage.keyed_random import CPU, Domain, KeyedRandom, Purpose


@dataclass(frozen=True)
class Draw:
    """A sampling request except for the image indices: solver, seed, guidance, classes."""

    solver: Solver
    seed: int
    guidance: float = 1.0
    """Guidance scale; 1 for none. Guidance is by the model's guide if it has one, else classifier-free."""
    classes: Sequence[int | str] = ()
    """Classes to sample, by number; empty for all."""
    tf32: bool = False
    """Whether float32 products and convolutions use TF32 on a GPU."""
    guidance_interval: Interval | None = None
    """The interval of t in which to guide; None: everywhere."""
    class_mode: Literal["drawn", "balanced", "in-turn"] | None = None
    """Assignment of classes to image indices, as in sample.class_mode."""

    def check(self, model: Model) -> None:
        """Check the request against the model. Raises UserError if the model does not support it."""
        if model.latent:
            shape = " x ".join(map(str, model.image_shape))
            raise UserError(
                f"the model is of latents ({shape}), and there is no decoder to make images of them; use its "
                "velocity, model.objective.velocity(model.network)"
            )
        classifier_free = self.guidance != 1 and model.guide is None
        if not model.conditional and (classifier_free or self.classes or self.class_mode):
            key = "guidance" if classifier_free else "classes" if self.classes else "class_mode"
            raise UserError(f"sample.{key}: the model was trained without classes (model.class_conditional)")
        # Files of earlier versions do not record label dropout.
        if classifier_free and model.recipe.get("train", {}).get("label_dropout") == 0:
            raise UserError(
                "sample.guidance: the model was trained without label dropout, so it has no unconditional "
                "field; use one that was trained with train.label_dropout, e.g. 0.1"
            )
        for number in self.classes:
            if isinstance(number, str):
                raise UserError(
                    f"sample.classes: {number!r}: names are in the data set, which is not there; give numbers"
                )
            if not 0 <= number < model.classes:
                raise UserError(f"sample.classes: {number} is not in 0 .. {model.classes - 1}")
        check_solver(self.solver, model.objective, model.coupling, guidance=self.guidance)
        check_guidance(model.objective, self.guidance if model.guide is None else 1.0)

    def noise(self, model: Model, indices: Sequence[int], device: torch.device = CPU) -> Tensor:
        """The initial noise of the images, float32 [n, *shape] on the device."""
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
        classes = torch.tensor([int(number) for number in self.classes or range(model.classes)])
        mode = self.class_mode or ("in-turn" if self.classes else "drawn")
        if mode == "in-turn":
            places = torch.tensor(indices) % len(classes)
        elif mode == "drawn":
            places = (self._random(model).uniform(Purpose.CLASS, indices) * len(classes)).long()
        else:
            places = self._balanced(model, torch.tensor(indices), len(classes))
        return classes[places]

    def _balanced(self, model: Model, indices: Tensor, count: int) -> Tensor:
        """A number below `count` for each index, int64 [n]; each occurs once in a block of `count` indices.

        Indices are ranked within a block by their uniform random numbers, so the result depends only on the
        seed and the index, and any number of images that is a multiple of `count` is exactly balanced.
        """
        blocks = indices.div(count, rounding_mode="floor")
        first, last = int(blocks.min()), int(blocks.max())
        positions = range(first * count, (last + 1) * count)
        uniform = self._random(model).uniform(Purpose.CLASS, positions)
        return uniform.view(-1, count).argsort(dim=1, stable=True)[blocks - first, indices % count]

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
        """Transport the noise of these indices by the velocity; `solver` overrides the request's solver.

        Raises the exceptions of `fm_core.method.ode.solve`.
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
        plain, interval = model.objective.velocity(model.network, labels), self.guidance_interval
        if model.guide is not None:
            guide = model.guide
            weaker = guide.objective.velocity(guide.network, labels if guide.conditional else None)
            return autoguided_velocity(plain, weaker, self.guidance, interval)
        if labels is None or self.guidance == 1:
            return plain
        return guided_velocity(model.objective, model.network, labels, self.guidance, interval=interval)


@dataclass(frozen=True)
class GeneratedBatch:
    """Images with consecutive indices from `first`, and their solver statistics."""

    first: int
    images: Tensor
    """uint8 [n, channels, height, width]."""
    ends: Tensor
    """float32 [n, channels, height, width]: the ends of the trajectories, whose intensity levels the images
    are; on the device of the solver."""
    labels: Tensor | None
    """int64 [n]: the requested classes; None for an unconditional model."""
    nfe: int
    """Network evaluations (NFE) per image, of all networks."""
    accepted: int | None
    rejected: int | None
    forwards: int
    """Network evaluations per evaluation of the field: two with guidance, inside its interval."""
    trajectory: Tensor | None = None
    """uint8 [T, n, channels, height, width], at the requested times."""
    guide_nfe: int = 0
    """The part of nfe spent in the weaker network of autoguidance."""


def generate(
    model: Model,
    draw: Draw,
    first: int,
    count: int,
    device: torch.device,
    at: Sequence[float] | None = None,
) -> GeneratedBatch:
    """Solve the ODE for images first .. first + count - 1 as one batch; `at` are times of the trajectory.

    An adaptive solver chooses one step size for the entire batch, so callers must split batches at fixed
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
        ends=solution.x,
        labels=labels,
        nfe=solution.nfe,
        accepted=solution.accepted,
        rejected=solution.rejected,
        forwards=forwards_per_call(velocity),
        trajectory=trajectory,
        guide_nfe=solution.guide_nfe,
    )


def time_grid(interval: tuple[float, float], count: int) -> list[float]:
    """`count` equally spaced times from the interval's start to its end."""
    start, end = interval
    return [start + (end - start) * i / (count - 1) for i in range(count - 1)] + [end]
