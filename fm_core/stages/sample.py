"""A checkpoint to images."""

from io import BytesIO
from typing import Any

import torch

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.report.pictures import grid
from fm_core.run.directory import RunDirectory, differences
from fm_core.run.progress import Observer, Progress, unobserved
from fm_core.run.supervise import supervise
from fm_core.sampling.model import Model, checkpoint_step, load_model, weights_file
from fm_core.sampling.store import SampleSet, protocol_of, solver_of
from fm_core.stages.record import recorded
from fm_core.stages.result import StageResult
from fm_core.training.snapshots import make_average

GRID_IMAGES = 64
GRID_COLUMNS = 8


def sample(config: RunConfig, observe: Observer = unobserved) -> StageResult:
    """Make exactly sample.images images, or check the hashes of those that are there.

    Raises UserError for missing checkpoints or settings that the solver would ignore, Stopped when
    asked to stop, RuntimeError when the job failed.
    """
    return recorded("sample", config, observe, lambda run, show: _sample(config, run, show))


def _sample(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    solver_of(config)
    step = checkpoint_step(config)
    make_average(config, step)
    # The ranks must all mean the same checkpoint, even if training adds one meanwhile.
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"step": step})})
    model = load_model(weights_file(config, step), torch.device("cpu"))
    found = differences(model.section.model_dump(mode="json"), config.model.model_dump(mode="json"), "model.")
    if found:
        raise UserError(f"{run.checkpoints} holds another network: {'; '.join(found)}")
    samples = SampleSet(config, step, protocol_of(config, model.weights_sha256))
    missing = samples.problems()
    whole = not missing and samples.done() and samples.store.size("grid.png")
    state = "verified" if whole else "done"
    for number in missing:
        # What is merely missing may be what a job is writing at this moment.
        if samples.shard(number):
            samples.remove(number)
    if missing:
        observe(Progress("sample", 0, samples.images, "images", "starting the processes"))
        control, logs = samples.control, run.path / "logs"
        supervise(
            control, logs, "sample", "fm_core.sampling.rank", config, lambda: not samples.problems(), observe
        )
    if state == "done":
        _finish(samples, model, step)
    nfe = (samples.done() or {})["nfe"]["mean"]
    observe(Progress("sample", samples.images, samples.images, "images", f"NFE {nfe:.0f}"))
    return StageResult(
        stage="sample",
        state=state,
        seconds=0.0,
        summary=f"{samples.images:,} images of step {step:,} with {solver_of(config).method}, NFE {nfe:.0f}",
        paths={"samples": samples.store.url, "grid": f"{samples.store.url}/grid.png"},
        counts={"images": samples.images, "nfe": nfe},
        hashes={"weights": model.weights_sha256},
    )


def _finish(samples: SampleSet, model: Model, step: int) -> None:
    first: list[torch.Tensor] = []
    for batch in samples.read(model.image_shape):
        first.append(batch)
        if sum(map(len, first)) >= GRID_IMAGES:
            break
    images = torch.cat(first)[:GRID_IMAGES]
    buffer = BytesIO()
    scale = max(1, 32 // model.image_shape[1])
    grid(images, model.quantiser.levels, GRID_COLUMNS, scale).save(buffer, format="PNG")
    samples.store.write_bytes("grid.png", buffer.getvalue())
    shards = samples.finished()
    nfe: dict[str, Any] = {
        "mean": sum(shard.nfe * shard.images for shard in shards) / samples.images,
        "batch_size": samples.batch,
        "accepted": [shard.accepted for shard in shards],
        "rejected": [shard.rejected for shard in shards],
    }
    samples.finish({"step": step, "images": samples.images, "nfe": nfe, "data_version": model.data_version})
