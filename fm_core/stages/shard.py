"""The shard stage: writes source images as verified shards."""

from fm_core.config import RunConfig
from fm_core.data.dataset_builder import read_complete, write_dataset
from fm_core.data.manifest import Manifest
from fm_core.data.shard_plan import make_plan
from fm_core.data.source_preview import contact_sheet, preview_source
from fm_core.data.sources.file_listing import endings_text
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress, RateMeter, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.stages.resolve import resolve_data
from fm_core.storage.local_paths import private_temporary_folder


def shard(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Write the data set of the configuration, or verify every hash of an existing one.

    Raises:
        UserError: the source is missing or invalid, another recipe exists under the same name, or the disk is
            full.
    """
    config = resolve_data(config)
    return run_stage_function("shard", config, observe, lambda run, show: _shard(config, run, show))


def shard_dry_run(config: RunConfig) -> str:
    """Describe, in lines of text, what sharding would do; writes only a temporary preview image.

    Raises:
        UserError: as for `shard`.
    """
    config = resolve_data(config)
    preview = preview_source(config.data)
    picture = private_temporary_folder("flow-matching") / f"shard-{config.data.name}.png"
    contact_sheet(preview).save(picture)
    return "\n".join([*preview.lines(), f"picture: {picture}"])


def _shard(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    existing = read_complete(config.data)
    total = (
        sum(split.images for split in existing.splits.values()) if existing else make_plan(config.data).images
    )
    run.begin()
    rate = RateMeter()

    def on_images(done: int) -> None:
        message = "checking hashes" if existing else "writing shards"
        observe(Progress("shard", done, total, "images", message, rate.rate(done)))

    on_images(0)
    manifest = write_dataset(config.data, on_images)
    on_images(total)
    return _result(config, manifest, verified=existing is not None)


def _result(config: RunConfig, manifest: Manifest, verified: bool) -> StageResult:
    counts = {split: float(record.images) for split, record in manifest.splits.items()}
    images = " + ".join(f"{int(count):,} {split}" for split, count in counts.items())
    not_read = manifest.interpretation.not_read if manifest.interpretation else {}
    others = f"; not read: {endings_text(not_read)}" if not_read else ""
    return StageResult(
        stage="shard",
        state="verified" if verified else "done",
        seconds=0.0,
        summary=f"{images} images in {len(manifest.shards)} shards{others}",
        paths={"manifest": f"{config.data.root.rstrip('/')}/{config.data.name}/manifest.json"},
        counts=counts,
        hashes={"data": manifest.version},
    )
