"""Rules that a configuration must satisfy before its stages start; those of networks import torch."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from fm_core.config import RunConfig
from fm_core.config.derived_defaults import DatasetSize, with_derived
from fm_core.data.sources import open_source
from fm_core.errors import UserError
from fm_core.evaluation.nfe_curve import check_curve
from fm_core.evaluation.requirements import check_extractors
from fm_core.launch.online_eval import MIN_IMAGES, check_online_eval
from fm_core.method.solver import Solver
from fm_core.models.build import build_meta_network, build_method
from fm_core.sampling.guide_model import guide_config, guide_file, used_guide
from fm_core.sampling.sample_protocol import solver_of
from fm_core.sampling.solver_check import check_guidance, check_solver
from fm_core.stages.train import check_initial_weights, check_pairs, check_training
from fm_core.training.ema import POWER, ema_decays

STAGES = ("shard", "train", "sample", "evaluate", "report")

Rule = Callable[[], None]
"""Raises UserError for the problem, in one line."""


def rules(config: RunConfig, stages: Sequence[str] = STAGES) -> Iterator[tuple[str, Rule]]:
    """The rules that a configuration must satisfy for these stages, by name; nothing is written."""
    if "train" in stages:
        yield "training", partial(check_training, config)
        yield "network", partial(_check_network, config)
        yield "initial weights", partial(check_initial_weights, config)
        yield "pairs", partial(check_pairs, config)
        yield "online evaluation", partial(_check_online_eval, config)
    if "evaluate" in stages:
        yield "feature extractors", partial(check_extractors, config.evaluate)
        yield "solvers of the curve", partial(_check_curve, config)
    if "sample" in stages:
        yield "samples", partial(_check_samples, config, "train" in stages, "evaluate" in stages)


def _check_network(config: RunConfig) -> None:
    shape = open_source(config.data).facts.image_shape
    # Whether the network can be built does not depend on the number of images, which may be unknown.
    config = with_derived(config, DatasetSize(side=shape[-1], images=1))
    two_times = build_method(config.method).objective.two_times
    build_meta_network(config.model, shape, classes=1, two_times=two_times)


def _check_online_eval(config: RunConfig) -> None:
    check_online_eval(config)
    online = config.evaluate.online
    if online.images:
        solver = Solver(method=online.solver, steps=online.steps)
        guidance = _own_guidance(config)
        objective, coupling = build_method(config.method).objective, config.method.coupling
        check_solver(solver, objective, coupling, "evaluate.online", guidance)
        check_guidance(objective, guidance, "evaluate.online")


def _check_curve(config: RunConfig) -> None:
    if config.evaluate.nfe_curve.images and not config.sample.weights.endswith(".safetensors"):
        objective = build_method(config.method).objective
        check_curve(config.evaluate.nfe_curve, objective, config.method.coupling, config.sample.guidance)
        check_guidance(objective, _own_guidance(config), "evaluate.nfe_curve")


def _own_guidance(config: RunConfig) -> float:
    """The scale of classifier-free guidance; 1 if a weaker model guides."""
    return 1.0 if config.sample.guide.named else config.sample.guidance


def _check_samples(config: RunConfig, trained_here: bool, scored: bool) -> None:
    solver = solver_of(config)
    # A file of weights may be of another method than this configuration's.
    if not config.sample.weights.endswith(".safetensors"):
        objective = build_method(config.method).objective
        check_solver(solver, objective, config.method.coupling, guidance=config.sample.guidance)
        check_guidance(objective, _own_guidance(config))
    weights, averages = config.sample.weights, [*ema_decays(config.train)]
    made_later = config.train.snapshot_images and weights.startswith(POWER)
    if weights.endswith(".safetensors"):
        if not Path(weights).exists():
            raise UserError(f"sample.weights: {weights} does not exist")
    elif weights not in ("ema", "raw", *averages) and not made_later:
        raise UserError(
            f"sample.weights {config.sample.weights}: must be one of ema, raw, {', '.join(averages)}, "
            "or a .safetensors file"
        )
    steps = -(-config.train.images // config.train.global_batch)
    if trained_here and config.sample.step not in ("latest", "best", steps):
        raise UserError(
            f"sample.step {config.sample.step}: this run ends at step {steps}; use fm sample for other steps"
        )
    _check_guidance(config, trained_here)
    if scored and config.sample.images < MIN_IMAGES:
        raise UserError(f"sample.images {config.sample.images}: scores need at least {MIN_IMAGES} images")


def _check_guidance(config: RunConfig, trained_here: bool) -> None:
    """Check that samples can be guided; the weights of another run must be there. Raises UserError."""
    if used_guide(config):
        if config.sample.guide.run is not None and guide_config(config) is None:
            guide_file(config)
        return
    own = trained_here and not config.sample.weights.endswith(".safetensors")
    if own and config.sample.guidance != 1 and not config.train.label_dropout:
        raise UserError(
            f"sample.guidance {config.sample.guidance:g}: it needs model.class_conditional: true and "
            "train.label_dropout, e.g. 0.1; without them, name a weaker model under sample.guide"
        )
