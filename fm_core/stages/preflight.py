"""What can be refused before anything is spent."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.config import RunConfig
from fm_core.data.dataset_builder import check_source
from fm_core.data.manifest import load_manifest
from fm_core.data.sources import open_source
from fm_core.errors import UserError
from fm_core.evaluation.evaluation_run import check_extractors
from fm_core.launch.online_eval import MIN_IMAGES, check_online_eval
from fm_core.models.build import build_meta_network
from fm_core.reproduce.experiments import experiments_of
from fm_core.run.directory import RunDirectory
from fm_core.sampling.sample_store import solver_of
from fm_core.stages import train
from fm_core.training.ema import POWER, ema_decays

STAGES = ("shard", "train", "sample", "evaluate", "report")

Rule = Callable[[], None]
"""Raises UserError in one line for what is wrong."""


def preflight(config: RunConfig, stages: Sequence[str] = STAGES) -> None:
    """Check sources, directories, sizes that must divide, and settings that must agree, for these stages.

    Raises UserError in one line for the first thing that is wrong.
    """
    if "shard" in stages:
        check_source(config.data)
    for _, rule in rules(config, stages):
        rule()
    RunDirectory(config).open()


def rules(config: RunConfig, stages: Sequence[str] = STAGES) -> Iterator[tuple[str, Rule]]:
    """What the configuration alone must satisfy for these stages, by name; nothing is written."""
    if "train" in stages:
        yield "training", partial(train.check, config)
        yield "network", partial(_check_network, config)
        yield "initial weights", partial(_check_initial_weights, config)
        yield "scores beside", partial(check_online_eval, config)
    if "evaluate" in stages:
        yield "judges", partial(check_extractors, config.evaluate)
    if "sample" in stages:
        yield "samples", partial(_check_samples, config, "train" in stages, "evaluate" in stages)
    if "reproduce" in stages and config.reproduce.kind == "images":
        yield from _rules_of_cells(config)


def images_of(config: RunConfig) -> tuple[tuple[int, int, int], int]:
    """Shape (channels, height, width) and classes of the shards; before there are any, the source's, 1,000.

    Raises UserError where neither is in sight.
    """
    try:
        manifest = load_manifest(config.data.root, config.data.name)
    except UserError:
        return open_source(config.data).facts.image_shape, 1000
    return manifest.image_shape, manifest.class_count or 0


def _rules_of_cells(config: RunConfig) -> Iterator[tuple[str, Rule]]:
    """Sampling and scoring are the same for all cells of a comparison."""
    cells = experiments_of(config)
    yield "judges", partial(check_extractors, config.evaluate)
    yield "samples", partial(_check_samples, cells[0].config, True, True)
    for cell in cells:
        yield f"training of {cell.name}", partial(train.check, cell.config)


def _check_network(config: RunConfig) -> None:
    facts = open_source(config.data).facts
    build_meta_network(config.model, facts.image_shape, classes=1)


def _check_initial_weights(config: RunConfig) -> None:
    wanted = config.train.init_from
    if not wanted or "://" in wanted or Path(wanted).exists():
        return
    if not CheckpointCatalog.of(config).steps():  # a run that has begun needs it no more
        raise UserError(
            f"train.init_from: {wanted} does not exist; name a run directory or a .safetensors file"
        )


def _check_samples(config: RunConfig, trained_here: bool, scored: bool) -> None:
    solver_of(config)
    weights, averages = config.sample.weights, [*ema_decays(config.train)]
    made_later = config.train.snapshot_images and weights.startswith(POWER)
    if weights.endswith(".safetensors"):
        if not Path(weights).exists():
            raise UserError(f"sample.weights: {weights} does not exist")
    elif weights not in ("ema", "raw", *averages) and not made_later:
        raise UserError(
            f"sample.weights {config.sample.weights}: there will be ema, raw, {', '.join(averages)}"
        )
    steps = -(-config.train.images // config.train.global_batch)
    if trained_here and config.sample.step not in ("latest", "best", steps):
        raise UserError(
            f"sample.step {config.sample.step}: this run ends at step {steps}; sample another alone"
        )
    if scored and config.sample.images < MIN_IMAGES:
        raise UserError(f"sample.images {config.sample.images}: scores need at least {MIN_IMAGES}")
