"""Source images to verified shards."""

from fm_core.config import RunConfig
from fm_core.data.dataset_builder import read_complete, write_dataset
from fm_core.data.manifest import Manifest
from fm_core.data.shard_plan import make_plan
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress, RateMeter, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function


def shard(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Write the data set of the configuration, or check every hash of the one that is there.

    Raises UserError for a missing or wrong source, another recipe at the same name, no disk.
    """
    return run_stage_function("shard", config, observe, lambda run, show: _shard(config, run, show))


def _shard(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    before = read_complete(config.data)
    total = sum(split.images for split in before.splits.values()) if before else make_plan(config.data).images
    pace = RateMeter()

    def on_images(done: int) -> None:
        message = "checking hashes" if before else "writing shards"
        observe(Progress("shard", done, total, "images", message, pace.rate(done)))

    on_images(0)
    manifest = write_dataset(config.data, on_images)
    on_images(total)
    return _result(config, manifest, verified=before is not None)


def _result(config: RunConfig, manifest: Manifest, verified: bool) -> StageResult:
    counts = {split: float(facts.images) for split, facts in manifest.splits.items()}
    images = " + ".join(f"{int(count):,} {split}" for split, count in counts.items())
    return StageResult(
        stage="shard",
        state="verified" if verified else "done",
        seconds=0.0,
        summary=f"{images} images in {len(manifest.shards)} shards",
        paths={"manifest": f"{config.data.root.rstrip('/')}/{config.data.name}/manifest.json"},
        counts=counts,
        hashes={"data": manifest.version},
    )
