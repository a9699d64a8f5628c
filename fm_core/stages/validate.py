"""Looks closely at a written data set, and mends it if asked."""

from fm_core.config import RunConfig
from fm_core.data.manifest import load_manifest
from fm_core.data.shards import repair_dataset
from fm_core.data.verify import Depth, validate_dataset
from fm_core.errors import UserError
from fm_core.run.progress import Observer, Pace, Progress, unobserved
from fm_core.stages.record import recorded
from fm_core.stages.result import StageResult


def validate(
    config: RunConfig, observe: Observer = unobserved, depth: Depth = "default", repair: bool = False
) -> StageResult:
    """Check the data set of the configuration: quick, default or deep; with `repair`, mend it first.

    Raises UserError that names each damaged shard.
    """
    return recorded("validate", config, observe, lambda run, show: _validate(config, show, depth, repair))


def _validate(config: RunConfig, observe: Observer, depth: Depth, repair: bool) -> StageResult:
    pace = Pace()
    if repair:
        repair_dataset(config.data)
    manifest = load_manifest(config.data.root, config.data.name)
    total = sum(split.images for split in manifest.splits.values())

    def on_images(done: int) -> None:
        observe(Progress("validate", done, total, "images", f"{depth} check", pace.rate(done)))

    on_images(0)
    found = validate_dataset(config.data, depth, on_images)
    on_images(total)
    if found.problems:
        listed = "; ".join(f"{file}: {problem}" for file, problem in found.problems.items())
        raise UserError(f"{config.data.root}/{config.data.name}: {listed}; fm validate --repair mends it")
    return StageResult(
        stage="validate",
        state="verified",
        seconds=0.0,
        summary="; ".join([f"{total:,} images in {len(manifest.shards)} shards are whole", *found.notes]),
        counts={"images": float(found.images)},
        hashes={"data": manifest.version},
    )
