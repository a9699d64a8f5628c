"""The validate stage: checks and repairs a written data set."""

from collections.abc import Callable

from fm_core.config import RunConfig
from fm_core.data.dataset_builder import repair_dataset
from fm_core.data.manifest import load_manifest
from fm_core.data.shard_plan import make_plan
from fm_core.data.verify import Depth, validate_dataset
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress, RateMeter, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.stages.resolve import resolve_data


def validate(
    config: RunConfig, observe: Observer = no_progress, depth: Depth = "default", repair: bool = False
) -> StageResult:
    """Check the data set of the configuration: quick, default or deep; with `repair`, repair it first.

    Raises:
        UserError: shards are damaged; the message names each of them.
    """
    config = resolve_data(config)
    return run_stage_function(
        "validate", config, observe, lambda run, show: _validate(config, run, show, depth, repair)
    )


def _validate(
    config: RunConfig, run: RunDirectory, observe: Observer, depth: Depth, repair: bool
) -> StageResult:
    if repair:
        run.begin()
        _repair(config, observe)
    manifest = load_manifest(config.data.root, config.data.name)
    run.begin()
    total = sum(split.images for split in manifest.splits.values())

    on_images = _progress(observe, total, f"{depth} check")
    on_images(0)
    validation = validate_dataset(config.data, depth, on_images)
    on_images(total)
    if validation.problems:
        problems = "; ".join(f"{file}: {problem}" for file, problem in validation.problems.items())
        raise UserError(
            f"{config.data.root}/{config.data.name}: {problems}; fm validate --repair rewrites damaged shards"
        )
    return StageResult(
        stage="validate",
        state="verified",
        seconds=0.0,
        summary="; ".join(
            [
                f"{total:,} images in {len(manifest.shards)} shards are intact",
                *validation.notes,
                *(manifest.interpretation.lines() if manifest.interpretation else []),
            ]
        ),
        counts={"images": float(validation.images)},
        hashes={"data": manifest.version},
    )


def _repair(config: RunConfig, observe: Observer) -> None:
    try:
        manifest = load_manifest(config.data.root, config.data.name)
        total = sum(split.images for split in manifest.splits.values())
    except UserError:  # if the manifest itself is damaged, the source is needed
        total = make_plan(config.data).images
    hashing, writing = _progress(observe, total, "looking for damage"), _progress(observe, total, "repairing")
    hashing(0)
    repair_dataset(config.data, writing, hashing)


def _progress(observe: Observer, total: int, message: str) -> Callable[[int], None]:
    rate = RateMeter()
    return lambda done: observe(Progress("validate", done, total, "images", message, rate.rate(done)))
