"""The sample stage: generates images from a checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fm_core.config import RunConfig
from fm_core.data.manifest import load_manifest
from fm_core.data.sample_shard import SampleShard
from fm_core.errors import UserError
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.models.flops import flops_per_image
from fm_core.report.gallery import SAMPLE_SIDE, STRIP_SIDE, factor_for
from fm_core.report.image_grids import animation, grid, name_rows, png, strip
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.sampling.checkpoint_source import (
    PINNED_GUIDE,
    Model,
    check_run,
    checkpoint_step,
    load_model,
    pin_weights,
    unpin_weights,
    weights_file,
)
from fm_core.sampling.guide_model import guide_config, guide_file, guide_step, used_guide, with_guide
from fm_core.sampling.sample_protocol import draw_of, protocol_of, solver_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.stages.resolve import resolve
from fm_core.training.posthoc_ema import make_average

GRID_IMAGES = 64
GRID_COLUMNS = 8
CLASS_ROWS = 10
STRIP_COLUMNS = 9
TRAINING_NOISE = (
    "sample.seed is that of the pairs that the model was trained on, so these samples begin at noise that it "
    "has seen; choose another seed for scores"
)


def sample(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Generate exactly sample.images images, or verify the hashes of existing ones.

    Raises:
        UserError: a checkpoint is missing, or settings would be ignored by the solver.
        StopRequested: the stage was asked to stop.
        RuntimeError: the job failed.
    """
    config = resolve(config)
    return run_stage_function("sample", config, observe, lambda run, show: _sample(config, run, show))


def _sample(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    draw_of(config)  # reports settings that the solver would ignore
    # All ranks must use the same checkpoint, even if training adds one in the meantime.
    config = with_checkpoints(config)
    step = checkpoint_step(config)
    weights = weights_file(config, step)
    model = checked_model(config)
    run.begin()
    protocol = protocol_of(config, model.weights_sha256, model.generator, model.guide_record)
    samples = SampleSet(config, step, protocol)
    missing = samples.problems()
    grids = all(samples.store.size(name) for name in _grid_files(samples))
    state = "verified" if not missing and samples.done() and grids else "done"
    for number in missing:
        # A missing shard may be one that a running job is writing.
        if samples.shard(number):
            samples.remove(number)
    if missing:
        observe(Progress("sample", 0, samples.images, "images", "starting the processes"))
        job = StageJob(
            control=samples.control,
            logs=run.path / "logs",
            stage="sample",
            worker="fm_core.sampling.sample_worker:sample",
            config=config,
            complete=lambda: not samples.problems(),
        )
        pin_weights(weights, samples.control)
        if model.guide:
            pin_weights(guide_file(config), samples.control, PINNED_GUIDE)
        supervise(job, observe)
        unpin_weights(samples.control)
    if state == "done":
        _finish(samples, model, step, _class_names(config))
    nfe = (samples.done() or {})["nfe"]["mean"]
    observe(Progress("sample", samples.images, samples.images, "images", f"NFE {nfe:.0f}"))
    return StageResult(
        stage="sample",
        state=state,
        seconds=0.0,
        summary=f"{samples.images:,} images of step {step:,} with {solver_of(config).method}, NFE {nfe:.0f}",
        paths={
            "samples": samples.store.url,
            "grid": f"{samples.store.url}/grid.png",
            **_trajectory_path(samples),
        },
        counts={"images": samples.images, "nfe": nfe},
        hashes={"weights": model.weights_sha256},
        notes={"noise": TRAINING_NOISE} if model.trained_on_noise_of(config.sample.seed) else {},
    )


def with_checkpoints(config: RunConfig) -> RunConfig:
    """The configuration with the steps of its checkpoint and of that of the weaker model, if there is one.

    Averages that training did not store are made from the snapshots. Raises UserError if a checkpoint is
    missing or an average cannot be made.
    """
    step = checkpoint_step(config)
    make_average(config, step)
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"step": step})})
    named = guide_config(config) if used_guide(config) else None
    if named is None:
        return config
    step = guide_step(named)
    make_average(named, step)
    guide = config.sample.guide.model_copy(update={"step": step})
    return config.model_copy(update={"sample": config.sample.model_copy(update={"guide": guide})})


def checked_model(config: RunConfig) -> Model:
    """The model of `with_checkpoints`, with its weaker model. UserError if it cannot give these samples."""
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), torch.device("cpu"), config)
    check_run(config, model, step)
    model = with_guide(model, config, torch.device("cpu"))
    draw_of(config).check(model)
    return model


def _class_names(config: RunConfig) -> Sequence[str]:
    """The names of the classes of the data set, if it is there and has names."""
    try:
        return load_manifest(config.data.root, config.data.name).class_names or ()
    except UserError:
        return ()


def _grid_files(samples: SampleSet) -> list[str]:
    return ["grid.png", *(["trajectory.png", "trajectory-animated.png"] if samples.trajectories else [])]


def _trajectory_path(samples: SampleSet) -> dict[str, str]:
    return {"trajectory": f"{samples.store.url}/trajectory.png"} if samples.trajectories else {}


def _finish(samples: SampleSet, model: Model, step: int, class_names: Sequence[str]) -> None:
    side = model.image_shape[-1]
    scale, strip_scale = factor_for(side, SAMPLE_SIDE), factor_for(side, STRIP_SIDE)
    levels = model.quantizer.levels
    images, columns, rows = _grid_images(samples, model)
    sheet = grid(images, levels, columns, scale)
    if rows:
        sheet = name_rows(sheet, [class_names[row] if row < len(class_names) else str(row) for row in rows])
    samples.store.write_bytes("grid.png", png(sheet))
    trajectory = samples.trajectory()
    if trajectory is not None:
        samples.store.write_bytes(
            "trajectory.png", png(strip(trajectory, levels, STRIP_COLUMNS, strip_scale))
        )
        frames = animation(trajectory, levels, GRID_COLUMNS, strip_scale)
        samples.store.write_bytes("trajectory-animated.png", frames)
    shards = samples.finished()
    nfe: dict[str, Any] = {
        "mean": sum(shard.nfe * shard.images for shard in shards) / samples.images,
        "batch_size": samples.batch,
        "forwards_per_evaluation": shards[0].forwards,
        "accepted": [shard.accepted for shard in shards],
        "rejected": [shard.rejected for shard in shards],
        **_guided_cost(samples, model, shards),
    }
    samples.finish({"step": step, "images": samples.images, "nfe": nfe, "data_version": model.data_version})


def _guided_cost(samples: SampleSet, model: Model, shards: Sequence[SampleShard]) -> dict[str, float]:
    """FLOPs per image of guided samples, and how many of the evaluations are those of a weaker network."""
    if "guidance" not in samples.protocol:
        return {}
    total = sum(shard.nfe * shard.images for shard in shards) / samples.images
    of_guide = sum(shard.guide_nfe * shard.images for shard in shards) / samples.images
    flops = (total - of_guide) * flops_per_image(model.network, model.image_shape)
    if model.guide is None:
        return {"flops_per_image": flops}
    flops += of_guide * flops_per_image(model.guide.network, model.image_shape)
    return {"guide_mean": of_guide, "flops_per_image": flops}


def _grid_images(samples: SampleSet, model: Model) -> tuple[Tensor, int, list[int]]:
    """The first images, the number per row, and the class of each row.

    With classes there is a row for each of the first ten; else the rows have no class.
    """
    rows: dict[int, list[Tensor]] = {}
    first: list[Tensor] = []
    for number in range(samples.batches):
        images, labels = samples.read_batch(number, model.image_shape), samples.read_labels(number)
        if labels is None:
            first += images[: GRID_IMAGES - len(first)]
            if len(first) == min(GRID_IMAGES, samples.images):
                break
            continue
        for image, label in zip(images, labels.tolist(), strict=True):
            row = rows.setdefault(label, []) if label in rows or len(rows) < CLASS_ROWS else []
            row += [image] if len(row) < GRID_COLUMNS else []
        if len(rows) == CLASS_ROWS and all(len(row) == GRID_COLUMNS for row in rows.values()):
            break
    blank = torch.zeros(model.image_shape, dtype=torch.uint8)
    for _, row in sorted(rows.items()):
        first += row + [blank] * (GRID_COLUMNS - len(row))
    return torch.stack(first), GRID_COLUMNS, sorted(rows)
