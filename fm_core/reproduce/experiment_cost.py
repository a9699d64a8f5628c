"""The cost of one experiment of a comparison, in network evaluations, operations and bytes.

The number of evaluations of an adaptive solver is not known in advance, so this work is counted in images, to
be multiplied by an assumed number of evaluations per image.
"""

from dataclasses import dataclass

import torch

from fm_core.config import FewStepsSection, NfeCurveSection, ReproduceSection, Toy2dSection
from fm_core.errors import UserError
from fm_core.evaluation.dataset_likelihood import PROBES
from fm_core.evaluation.nfe_curve import solver_settings
from fm_core.method.flow_map import FlowMap
from fm_core.method.objectives import Objective, Regression
from fm_core.method.solver import EVALUATIONS_PER_STEP, Solver
from fm_core.models.flops import TRAINING_PASSES, flops_per_image, parameter_count
from fm_core.models.mlp import MLP
from fm_core.reproduce.experiments import Experiment, objective_of
from fm_core.reproduce.few_steps import solver_curve
from fm_core.reproduce.students import PAIRS_SOLVER, PAIRS_STEPS, student_config, student_curve
from fm_core.reproduce.toy2d.few_evaluations import few_curve
from fm_core.reproduce.toy2d.scoring import TRAJECTORY_TIMES
from fm_core.sampling.sample_protocol import solver_of
from fm_core.training.cost_model import FLOAT32, Cluster, training_cost

DEVICE = Cluster(1, 1, peak=1.0, mfu=1.0, store_rate=1.0)
"""One device at one operation per second: only operations and bytes are read from its costs."""
DIMENSIONS = 2
"""Coordinates of a point of the 2-D data."""


@dataclass(frozen=True)
class Assumptions:
    """Assumed values of quantities that cannot be known in advance."""

    peak: float | None
    """Peak operations per second of one device by its data sheet; None if it does not predict the time."""
    mfu: float = 0.3
    """Model FLOPs utilization: the fraction of the peak that is spent on the network's operations."""
    images_per_s: float | None = None
    """Measured training throughput of one device in images per second; replaces `peak` and `mfu`."""
    nfe: float | None = None
    """Network evaluations per image by dopri5."""

    def __post_init__(self) -> None:
        for name in ("peak", "mfu", "images_per_s", "nfe"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value:g}: it must be greater than 0")
        if self.mfu > 1:
            raise UserError(f"--mfu {self.mfu:g}: it is a share of the peak and must be at most 1")

    def flops_per_s(self, training_flops: float) -> float | None:
        """Operations per second of one device if training on an image takes `training_flops`; or None."""
        if self.images_per_s:
            return self.images_per_s * training_flops
        return self.peak * self.mfu if self.peak else None


@dataclass(frozen=True)
class ExperimentCost:
    """Cost of one objective with one seed. An evaluation is one forward pass of the network for one image."""

    parameters: int
    steps: int
    forward_flops: float
    """Operations of one evaluation."""
    training_flops: float
    """Operations of training on one image."""
    trained_images: int
    predictable: bool
    """Whether the passes of a training step are a fixed number; false if a step solves an ODE."""
    fixed_evaluations: int
    """Evaluations for samples by fixed-step solvers."""
    solved_images: int
    """Number of samples drawn by an adaptive solver."""
    scored_images: int
    """Number of images whose likelihood an adaptive solver computes, counting each dequantization draw."""
    scored_passes: int
    """Passes per evaluation of the likelihood ODE: the forward pass, and one backward pass per probe."""
    student_flops: float
    """Operations of training the students of the experiment."""
    checkpoint_bytes: int
    """Size of all checkpoints that are retained."""
    sample_bytes: int

    @property
    def total_training_flops(self) -> float | None:
        """Operations of the entire training; None if not predictable."""
        own = self.trained_images * self.training_flops
        return own + self.student_flops if self.predictable else None

    @property
    def fixed_flops(self) -> float:
        """Operations for all samples by fixed-step solvers."""
        return self.fixed_evaluations * self.forward_flops

    def solved_flops(self, nfe: float) -> float:
        """Operations for the samples by an adaptive solver, at `nfe` evaluations per sample."""
        return self.solved_images * nfe * self.forward_flops

    def scored_flops(self, nfe: float) -> float:
        """Operations for the likelihoods, at `nfe` evaluations per image."""
        return self.scored_images * nfe * self.scored_passes * self.forward_flops


def image_experiment_cost(
    experiment: Experiment,
    reproduce: ReproduceSection,
    image_shape: tuple[int, int, int],
    classes: int,
) -> ExperimentCost:
    """The cost of an experiment of a comparison, with `image_shape` = (channels, height, width).

    Feature extraction, and the training of the classifier if there is one, are not counted.

    Raises:
        UserError: the network cannot be built for such images, or a solver is unknown.
    """
    config, images, few = experiment.config, reproduce.images, reproduce.few_steps
    objective = objective_of(experiment.section)
    training = training_cost(config, image_shape, classes, DEVICE)
    sample, likelihood, curve = config.sample, config.evaluate.likelihood, config.evaluate.nfe_curve
    guided = 2 if sample.guidance != 1 else 1
    solver = solver_of(config)
    samples = sample.images + images.curve_images * training.checkpoints
    curve_solvers = [point.solver for point in solver_settings(curve)] if curve.images else []
    fixed = curve.images and curve.images * curve_evaluations(curve)
    fixed += samples * _evaluations(solver) + images.shown_images * sum(images.shown_nfe)
    students = few.students if experiment.section.name == few.teacher else ()
    if experiment.section.name in few.experiments:
        fixed += sample.images * curve_evaluations(solver_curve(config, few))
    configs = [student_config(config, student) for student in students]
    taught = [training_cost(each, image_shape, classes, DEVICE) for each in configs]
    for student, each in zip(students, configs, strict=True):
        own = curve_evaluations(student_curve(each, few))
        fixed += sample.images * (own + _evaluations(solver_of(each)))
        fixed += student.pairs * _evaluations(Solver(PAIRS_SOLVER, steps=PAIRS_STEPS))
    adaptive = curve.images * sum(each.adaptive for each in curve_solvers)
    adaptive += samples * (not _evaluations(solver))
    checks = min(likelihood.check_images, likelihood.images)
    return ExperimentCost(
        parameters=training.parameters,
        steps=training.steps,
        forward_flops=training.forward_flops,
        training_flops=training.training_flops,
        trained_images=config.train.images,
        predictable=isinstance(objective, Regression | FlowMap),
        fixed_evaluations=fixed * guided,
        solved_images=adaptive,
        scored_images=likelihood.images * likelihood.draws + checks,
        scored_passes=1 + PROBES,
        student_flops=sum(each.total_flops for each in taught),
        checkpoint_bytes=training.checkpoint_bytes * min(training.checkpoints, config.train.keep_checkpoints)
        + sum(each.checkpoint_bytes * each.checkpoints for each in taught),
        sample_bytes=training.image_bytes * (sample.images + images.shown_images * len(images.shown_nfe))
        + training.image_bytes * (1 + FLOAT32) * sum(each.pairs for each in students),
    )


def toy_experiment_cost(
    toy: Toy2dSection, objective: Objective, steps: int, few: FewStepsSection | None = None, pairs: int = 0
) -> ExperimentCost:
    """The cost of a 2-D experiment that is trained for `steps` steps, and scored at few evaluations if given.

    Its points are counted as images. `pairs` are the trajectories that a student is trained on.
    """
    with torch.device("meta"):
        network = MLP(DIMENSIONS, toy.width, toy.layers)
    parameters, forward = parameter_count(network), flops_per_image(network, (DIMENSIONS,))
    few_solvers = [point.solver for point in solver_settings(few_curve(objective, few))] if few else []
    tensors = toy.samples * (TRAJECTORY_TIMES + len(toy.nfe)) * DIMENSIONS + toy.grid**2
    return ExperimentCost(
        parameters=parameters,
        steps=steps,
        forward_flops=forward,
        training_flops=forward * (TRAINING_PASSES + objective.extra_forwards),
        trained_images=steps * toy.batch,
        predictable=isinstance(objective, Regression | FlowMap),
        fixed_evaluations=toy.samples * (sum(toy.nfe) + sum(map(_evaluations, few_solvers))),
        solved_images=toy.samples + pairs,
        scored_images=toy.held_out + toy.grid**2,
        scored_passes=1 + DIMENSIONS,
        student_flops=0.0,
        checkpoint_bytes=FLOAT32 * parameters,
        sample_bytes=FLOAT32 * tensors,
    )


def curve_evaluations(curve: NfeCurveSection) -> int:
    """Evaluations per image of the fixed-step solvers of a curve and of its reference solution."""
    return curve.exact_nfe + sum(_evaluations(point.solver) for point in solver_settings(curve))


def _evaluations(solver: Solver) -> int:
    """Evaluations per image of a fixed-step solver; 0 for an adaptive solver, where they are unknown."""
    return (solver.steps or 0) * EVALUATIONS_PER_STEP.get(solver.method, 0)
