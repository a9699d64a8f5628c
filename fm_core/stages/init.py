"""The init command: from a folder of images to a configuration file that trains on this machine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from fm_core.config import LaunchSection, RunConfig, parse_config, read_yaml
from fm_core.config.derived_defaults import dataset_name, learning_rate_for, with_values
from fm_core.config.location import absolute_source
from fm_core.config.starter_file import SourceSummary, TimeEstimate, duration, starter_file
from fm_core.data.shard_plan import ShardPlan, make_plan
from fm_core.data.sources.detect import detect
from fm_core.errors import UserError
from fm_core.launch.dispatch import device_count, world
from fm_core.models.build import build_meta_network
from fm_core.models.flops import flops_per_image, parameter_count
from fm_core.run.directory import RunDirectory
from fm_core.stages.resolve import resolve
from fm_core.training.throughput import Throughput, measure_throughput

PUBLISHED_SIZES: dict[str, tuple[int | None, ...]] = {
    "imagenet-npz": (64, 32, 16, 8),
    "imagenet-png": (64, 32),
    "cifar10": (None,),
}
"""Image sizes of formats whose images are not resized, in the order in which they are tried."""
DEFAULT_SIZE = 64
LONGEST_SECONDS = {"cpu": 86_400.0, "gpu": 7 * 86_400.0}
"""A narrower network is chosen if training would take longer than this."""
CPU_MICRO_BATCH, LARGE_SIDE = 16, 32
"""Without a GPU, images per forward pass from this side on, to limit the memory of activations."""
GLOBAL_BATCH = 128
TIME_SCALE = 10.0
"""model.time_scale of new runs: slow features of t make the velocity smooth in t. On digits dopri5 needs 80
evaluations instead of 211, and MeanFlow can be trained from the model; the quality is the same
(infra/docs/sampling-and-evaluation.md). The paper's network has 1000."""
AB2_STEPS, MIDPOINT_STEPS, FEWEST_SAMPLES = 100, 20, 64
"""Steps of ab2, one evaluation each, and of the solver that is used if they would take too long. With fixed
steps images do not depend on their batch; on digits the error of ab2 is 3e-4, for values in [-1, 1]."""

Measure = Callable[[RunConfig, tuple[int, int, int], int, int], Throughput]


@dataclass(frozen=True)
class StarterConfig:
    """The configuration that `fm init` wrote."""

    path: Path
    source: SourceSummary
    time: TimeEstimate
    config: RunConfig

    def text(self) -> str:
        """Describe the source, the chosen network and the next two commands."""
        source, side = self.source, self.config.data.source.image_size
        classes = f"{source.classes:,} classes" if source.classes else "no classes"
        counts = " + ".join(f"{images:,} {split}" for split, images in source.splits.items())
        size = f", {side} x {side} pixels" if side else ""
        return "\n".join(
            [
                f"{self.path}: {counts} images ({source.format}), {classes}{size}",
                *(f"  {note}" for note in source.notes),
                f"  network: {self.time.parameters / 1e6:.1f} M parameters; training: "
                f"{duration(self.time.seconds)} at {self.time.images_per_s:,.3g} images/s, measured on "
                f"{self.time.device}",
                "next:",
                f"  fm shard --config {self.path}",
                f"  fm train --config {self.path}",
            ]
        )


def init(
    source: str, size: int | None = None, name: str | None = None, measure: Measure = measure_throughput
) -> StarterConfig:
    """Inspect the images and this machine and write <name>.yaml to the current directory.

    Args:
        source: folder or fsspec URL of the images.
        size: height and width to resize the images to, in pixels; by default 64, or the published size.
        name: name of the run and its data set; by default from the last part of the URL.
        measure: measures the speed of training.

    Raises:
        UserError: no images are found there, or the file already exists.
    """
    url = absolute_source(source)
    config, plan = _inspect(url, size, name)
    path = _path(config)
    shape, classes = plan.source.facts.image_shape, plan.classes.count or 0
    summary = _summary(url, config, plan)
    config = _with_batch(config, shape[-1])
    config, speed, parameters = _fit(config, shape, classes, measure)
    time = TimeEstimate(
        config.train.images / speed.images_per_s, speed.images_per_s, speed.device, parameters
    )
    config = _with_samples(config, time)
    text = starter_file(summary, _tree(config, summary), time)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return StarterConfig(path, summary, time, parse_config(read_yaml(path), str(path)))


def _inspect(url: str, size: int | None, name: str | None) -> tuple[RunConfig, ShardPlan]:
    """The configuration with all derived values, and the plan of the data set. UserError without images."""
    kind = detect(url)
    sizes: Sequence[int | None] = PUBLISHED_SIZES.get(kind, (DEFAULT_SIZE,)) if size is None else (size,)
    first_error: UserError | None = None
    for image_size in sizes:
        source = {"format": kind, "url": url, **({"image_size": image_size} if image_size else {})}
        config = parse_config({"data": {"source": source}}, "fm init")
        names = {
            "run": {"name": name or dataset_name(config.data)},
            "data": {"source": source, **({"name": name} if name else {})},
        }
        config = parse_config(names, "fm init --name")
        if _path(config).exists():
            raise UserError(f"{_path(config)} exists; remove it, or choose another name with --name")
        if RunDirectory(config).bound_config() is not None:
            raise UserError(f"{RunDirectory(config).path} is a trained run; choose another name with --name")
        try:
            config = resolve(config, from_source=True)
            plan = make_plan(config.data)
            plan.source.release()
        except UserError as error:
            first_error = first_error or error
            continue
        network = {"class_conditional": plan.classes.count is not None, "time_scale": TIME_SCALE}
        dropout = {"label_dropout": 0.1 if plan.classes.count is not None else 0.0}
        return with_values(config, {"model": network, "train": dropout}), plan
    assert first_error is not None
    raise first_error


def _path(config: RunConfig) -> Path:
    return Path(f"{config.run.name}.yaml")


def _summary(url: str, config: RunConfig, plan: ShardPlan) -> SourceSummary:
    splits: dict[str, int] = {}
    for task in plan.tasks:
        splits[task.split] = splits.get(task.split, 0) + task.rows
    seeded = "validation_images" in plan.source.facts.recipe
    return SourceSummary(
        url=url,
        format=str(config.data.source.format),
        splits=splits,
        own_split=not seeded or plan.interpretation.own_validation,
        classes=plan.classes.count,
        class_names=plan.classes.names or (),
        notes=[line for line in plan.interpretation.lines() if line.startswith(("not read", "note"))],
    )


def _with_batch(config: RunConfig, side: int) -> RunConfig:
    """Choose a global batch that the processes of this machine divide, for images of `side` pixels."""
    processes = world(LaunchSection())[0]
    batch = processes * ceil(GLOBAL_BATCH / processes)
    micro = CPU_MICRO_BATCH if device_count() == 0 and side >= LARGE_SIDE else None
    warmup = {"warmup_images": min(100 * batch, config.train.images)}
    return with_values(config, {"train": {"global_batch": batch, "micro_batch": micro, **warmup}})


def _fit(
    config: RunConfig, shape: tuple[int, int, int], classes: int, measure: Measure
) -> tuple[RunConfig, Throughput, int]:
    """The widest network that trains in an acceptable time, its measured speed and its parameters."""
    processes = world(LaunchSection())[0]
    batch = config.train.micro_batch or config.train.global_batch // processes
    speed = measure(config, shape, classes, batch)
    longest = LONGEST_SECONDS["gpu" if device_count() else "cpu"]
    full = flops_per_image(build_meta_network(config.model, shape, classes), shape)
    chosen = config
    for chosen in _narrower(config):
        flops = flops_per_image(build_meta_network(chosen.model, shape, classes), shape)
        if chosen.train.images * flops / (full * speed.images_per_s) <= longest:
            break
    if chosen != config:
        speed = measure(chosen, shape, classes, batch)
    if speed.micro_batch and speed.micro_batch < batch:
        micro = speed.micro_batch
        share = micro * ceil(batch / micro)
        sizes = {"micro_batch": micro, "global_batch": share * processes}
        chosen = with_values(chosen, {"train": sizes})
    return chosen, speed, parameter_count(build_meta_network(chosen.model, shape, classes))


def _narrower(config: RunConfig) -> Iterator[RunConfig]:
    """The configuration, then ones with smaller and smaller networks of the same resolutions."""
    yield config
    for channels, blocks in ((64, 2), (64, 1), (32, 1)):
        model = config.model
        if (channels, blocks) < (model.channels, model.residual_blocks):
            smaller = {"channels": channels, "residual_blocks": blocks, "head_channels": min(64, channels)}
            train = {"learning_rate": learning_rate_for(channels)}
            yield with_values(config, {"model": smaller, "train": train})


def _with_samples(config: RunConfig, time: TimeEstimate) -> RunConfig:
    """Choose sampling to take at most a tenth of the training time, but between ten minutes and an hour."""
    allowed = min(3600.0, max(600.0, time.seconds / 10))
    forward_rate = 3 * time.images_per_s
    if config.sample.images * AB2_STEPS / forward_rate <= allowed:
        return with_values(config, {"sample": {"solver": "ab2", "steps": AB2_STEPS}})
    images = int(allowed * forward_rate / (2 * MIDPOINT_STEPS))
    sample = {
        "images": max(FEWEST_SAMPLES, min(images, config.sample.images)),
        "batch": FEWEST_SAMPLES,
        "solver": "midpoint",
        "steps": MIDPOINT_STEPS,
    }
    return with_values(config, {"sample": sample})


def _tree(config: RunConfig, summary: SourceSummary) -> dict[str, dict[str, Any]]:
    """The values that the file contains."""
    data, model, train, sample = config.data, config.model, config.train, config.sample
    keys = ("images", "global_batch", "micro_batch", "learning_rate", "warmup_images", "ema_decays")
    train_keys = (*keys, *(["label_dropout"] if train.label_dropout else []), "checkpoint_images")
    size = {"image_size": data.source.image_size} if data.source.image_size else {}
    return {
        "run": {"name": config.run.name},
        "data": {
            "name": data.name,
            "source": {"format": data.source.format, "url": data.source.url, **size},
            **({} if summary.own_split else {"validation_images": data.validation_images}),
            "horizontal_flip": data.horizontal_flip,
        },
        "model": {
            "channels": model.channels,
            "channel_multipliers": list(model.channel_multipliers),
            "residual_blocks": model.residual_blocks,
            "attention_resolutions": list(model.attention_resolutions),
            "head_channels": model.head_channels,
            "time_scale": model.time_scale,
            "class_conditional": model.class_conditional,
        },
        "train": {key: value for key in train_keys if (value := _plain(getattr(train, key))) is not None},
        "sample": {
            "images": sample.images,
            **(
                {"batch": sample.batch, "solver": sample.solver, "steps": sample.steps}
                if sample.steps
                else {}
            ),
        },
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
