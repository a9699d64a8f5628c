"""What one objective of a comparison will take, in evaluations, operations and bytes.

How often an adaptive solver evaluates the network is known only when it has solved: such work is counted in
images, each to be multiplied by a number of evaluations that somebody states.
"""

from dataclasses import dataclass

import torch

from fm_core.config import ImagesSection, PlaneSection, RunConfig
from fm_core.errors import UserError
from fm_core.evaluation.dataset_likelihood import PROBES
from fm_core.evaluation.nfe_curve import EVALUATIONS_PER_STEP, solver_settings
from fm_core.method.objectives import Objective, Regression
from fm_core.method.ode import Solver
from fm_core.models.flops import TRAINING_PASSES, flops_per_image, parameter_count
from fm_core.models.mlp import MLP
from fm_core.reproduce.toy2d.scoring import INSTANTS
from fm_core.sampling.sample_store import solver_of
from fm_core.training.cost_model import FLOAT32, Cluster, training_cost

PLANE = 2
"""Coordinates of a point."""


@dataclass(frozen=True)
class Stated:
    """What cannot be known before, and is stated by whoever asks."""

    peak: float | None
    """Operations per second of one device, as its maker states them; None where that tells no time."""
    mfu: float = 0.3
    """Share of the peak that goes into the network's operations."""
    images_per_s: float | None = None
    """Images per second that one device trains on, measured; it takes the place of the two above."""
    nfe: float | None = None
    """Evaluations of the network that dopri5 takes for an image."""

    def __post_init__(self) -> None:
        for name in ("peak", "mfu", "images_per_s", "nfe"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value:g}: it must be more than 0")
        if self.mfu > 1:
            raise UserError(f"--mfu {self.mfu:g}: it is a share of the peak, at most 1")

    def flops_per_s(self, training_flops: float) -> float | None:
        """Operations per second of one device that takes `training_flops` to train on an image; or None."""
        if self.images_per_s:
            return self.images_per_s * training_flops
        return self.peak * self.mfu if self.peak else None


@dataclass(frozen=True)
class ExperimentCost:
    """One objective with one seed. An evaluation is one forward pass of the network for one image."""

    parameters: int
    steps: int
    forward_flops: float
    """Of one evaluation."""
    training_flops: float
    """Of training on one image."""
    trained_images: int
    predictable: bool
    """Whether a training step is one forward and one backward pass; where a step solves an ODE it is not."""
    fixed_evaluations: int
    """Of samples by solvers of fixed steps."""
    solved_images: int
    """Samples that an adaptive solver makes."""
    scored_images: int
    """Images whose likelihood an adaptive solver finds, each dequantisation draw counted."""
    scored_passes: int
    """Passes for one evaluation of the likelihood's ODE: the forward pass, and one back for each probe."""
    checkpoint_bytes: int
    """Of all checkpoints that stay."""
    sample_bytes: int

    @property
    def total_training_flops(self) -> float | None:
        """Of the whole training; None where it is not predictable."""
        return self.trained_images * self.training_flops if self.predictable else None

    @property
    def fixed_flops(self) -> float:
        """Of all samples by solvers of fixed steps."""
        return self.fixed_evaluations * self.forward_flops

    def solved_flops(self, nfe: float) -> float:
        """Of the samples by an adaptive solver that takes so many evaluations for each."""
        return self.solved_images * nfe * self.forward_flops

    def scored_flops(self, nfe: float) -> float:
        """Of the likelihoods, by a solver that takes so many evaluations for each."""
        return self.scored_images * nfe * self.scored_passes * self.forward_flops


def image_experiment_cost(
    config: RunConfig,
    images: ImagesSection,
    objective: Objective,
    image_shape: tuple[int, int, int],
    classes: int,
) -> ExperimentCost:
    """The cost of a cell whose run is `config`, on images of `image_shape` = (channels, height, width).

    Features of images, and where there is one the training of the classifier, are not counted.

    Raises:
        UserError: the network cannot be built for such images, or a solver is unknown.
    """
    training = training_cost(config, image_shape, classes, Cluster(1, 1, peak=1.0, mfu=1.0, store_rate=1.0))
    sample, likelihood, curve = config.sample, config.evaluate.likelihood, config.evaluate.nfe_curve
    guided = 2 if sample.guidance != 1 else 1
    asked = solver_of(config)
    drawn = sample.images + images.curve_images * training.checkpoints
    solvers = [point.solver for point in solver_settings(curve)] if curve.images else []
    fixed = sum(_evaluations(solver) for solver in solvers) * curve.images
    fixed += curve.images and curve.images * curve.exact_nfe
    fixed += drawn * _evaluations(asked) + images.shown_images * sum(images.shown_nfe)
    adaptive = curve.images * sum(solver.adaptive for solver in solvers) + drawn * (not _evaluations(asked))
    checks = min(likelihood.check_images, likelihood.images)
    return ExperimentCost(
        parameters=training.parameters,
        steps=training.steps,
        forward_flops=training.forward_flops,
        training_flops=training.training_flops,
        trained_images=config.train.images,
        predictable=isinstance(objective, Regression),
        fixed_evaluations=fixed * guided,
        solved_images=adaptive,
        scored_images=likelihood.images * likelihood.draws + checks,
        scored_passes=1 + PROBES,
        checkpoint_bytes=training.checkpoint_bytes * min(training.checkpoints, config.train.keep_checkpoints),
        sample_bytes=training.image_bytes * (sample.images + images.shown_images * len(images.shown_nfe)),
    )


def toy_experiment_cost(plane: PlaneSection, objective: Objective, steps: int) -> ExperimentCost:
    """The cost of a cell of the plane that is trained for `steps` steps; its images are points."""
    with torch.device("meta"):
        network = MLP(PLANE, plane.width, plane.layers)
    parameters, forward = parameter_count(network), flops_per_image(network, (PLANE,))
    shown = plane.samples * (INSTANTS + len(plane.nfe)) * PLANE + plane.grid**2
    return ExperimentCost(
        parameters=parameters,
        steps=steps,
        forward_flops=forward,
        training_flops=forward * TRAINING_PASSES,
        trained_images=steps * plane.batch,
        predictable=isinstance(objective, Regression),
        fixed_evaluations=plane.samples * sum(plane.nfe),
        solved_images=plane.samples,
        scored_images=plane.held_out + plane.grid**2,
        scored_passes=1 + PLANE,
        checkpoint_bytes=FLOAT32 * parameters,
        sample_bytes=FLOAT32 * shown,
    )


def _evaluations(solver: Solver) -> int:
    """Of a solver of fixed steps, for an image; 0 for one that nobody knows before."""
    return (solver.steps or 0) * EVALUATIONS_PER_STEP.get(solver.method, 0)
