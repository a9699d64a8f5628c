"""Cost model of a training run: FLOPs, time, checkpoint bytes, network traffic and memory, in advance."""

from dataclasses import dataclass
from functools import cache

from fm_core.config import ModelSection, RunConfig
from fm_core.errors import UserError
from fm_core.models.build import build_meta_network, build_method
from fm_core.models.flops import TRAINING_PASSES, flops_per_image, parameter_count
from fm_core.run.results import Check

FLOAT32, BFLOAT16 = 4, 2
"""Bytes per number."""
STORED_BYTES = {"uint8": 1, "float16": 3, "float32": 5}
"""Bytes per value of a sample, by sample.store: intensity level and float."""
MOMENTS = 2
"""float32 numbers that AdamW stores per weight, besides the weight itself."""
STAGES = (1, 2, 3)
DAY = 86_400


@dataclass(frozen=True)
class Cluster:
    """The hardware of a run."""

    hosts: int
    devices: int
    """Devices of each host; one process per device."""
    peak: float
    """Peak FLOP/s of one device in the precision of the network, from the vendor's data sheet."""
    mfu: float
    """Model FLOPs utilization, a fraction of the peak: measured on a similar machine, or assumed."""
    store_rate: float
    """Bytes per second from one host to the checkpoint root."""

    def __post_init__(self) -> None:
        for name in ("hosts", "devices", "peak", "mfu", "store_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name):g}: must be more than 0")
        if self.mfu > 1:
            raise UserError(f"--mfu {self.mfu:g}: must be a share of the peak, at most 1")

    @property
    def processes(self) -> int:
        """Number of processes of the run."""
        return self.hosts * self.devices


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a run, in bytes and seconds; FLOPs are counted as in fm_core/models/flops.py."""

    parameters: int
    forward_flops: float
    """For one image."""
    training_flops: float
    """For one image: forward and backward pass, including passes that the objective adds and recomputation by
    gradient checkpointing."""
    total_flops: float
    images_per_s: float
    """Over all devices."""
    seconds: float
    step_seconds: float
    steps: int
    image_bytes: int
    loader_bytes_per_s: float
    """Bytes of pixels per second on each host."""
    checkpoint_bytes: int
    checkpoint_seconds: float
    checkpoints: int
    """Number of checkpoints written in total."""
    storage_bytes: int
    """Bytes of the retained checkpoints and the samples of one evaluation."""
    network_bytes: dict[int, float]
    """Bytes that one device sends in one step, by ZeRO stage."""
    memory_bytes: dict[int, float]
    """Weights, gradients, optimizer and averages on one device, without activations, by ZeRO stage."""


def training_cost(
    config: RunConfig, image_shape: tuple[int, int, int], classes: int, to: Cluster
) -> TrainingCost:
    """The cost of training `config` on images of `image_shape` = (channels, height, width).

    Raises UserError if the network cannot be built for such images.
    """
    train = config.train
    objective = build_method(config.method).objective
    parameters, forward = _network_size(
        config.model.model_dump_json(), image_shape, classes, objective.two_times
    )
    needed = TRAINING_PASSES + objective.extra_forwards
    passes = needed + train.gradient_checkpointing
    rate = to.processes * to.peak * to.mfu / (forward * needed)
    if train.gradient_checkpointing:
        # The recomputed forward pass takes time, but does not count in MFU.
        rate *= needed / passes
    image_bytes = image_shape[0] * image_shape[1] * image_shape[2]
    checkpoint = checkpoint_bytes(parameters, _averages(config))
    # auto means bfloat16 on GPUs, for which the cost is estimated.
    number = FLOAT32 if train.precision == "fp32" else BFLOAT16
    share = max(1, train.global_batch // to.processes)
    micro_batches = max(1, share // min(train.micro_batch or share, share))
    return TrainingCost(
        parameters=parameters,
        forward_flops=forward,
        training_flops=forward * passes,
        total_flops=forward * passes * train.images,
        images_per_s=rate,
        seconds=train.images / rate,
        step_seconds=train.global_batch / rate,
        steps=-(-train.images // train.global_batch),
        image_bytes=image_bytes,
        loader_bytes_per_s=rate * image_bytes / to.hosts,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint / to.store_rate,
        checkpoints=-(-train.images // train.checkpoint_images),
        storage_bytes=checkpoint * train.keep_checkpoints
        + config.sample.images * image_bytes * STORED_BYTES[config.sample.store],
        network_bytes={
            stage: network_bytes(parameters, stage, to.processes, micro_batches, number) for stage in STAGES
        },
        memory_bytes={
            stage: memory_bytes(parameters, _averages(config), stage, to.processes, micro_batches, number)
            for stage in STAGES
        },
    )


def checkpoint_bytes_of(config: RunConfig, image_shape: tuple[int, int, int], classes: int) -> int:
    """Bytes of one checkpoint of a run on images of `image_shape` = (channels, height, width)."""
    two_times = build_method(config.method).objective.two_times
    network = build_meta_network(config.model, image_shape, classes, two_times)
    return checkpoint_bytes(parameter_count(network), _averages(config))


@cache
def _network_size(
    model: str, image_shape: tuple[int, int, int], classes: int, two_times: bool
) -> tuple[int, float]:
    """Parameters, and FLOPs of a forward pass on one image, of the network of a model section as JSON.

    Counting takes a second for a network of 300 million parameters, so the result is cached.
    """
    network = build_meta_network(ModelSection.model_validate_json(model), image_shape, classes, two_times)
    return parameter_count(network), flops_per_image(network, image_shape)


def _averages(config: RunConfig) -> int:
    return len(config.train.ema_decays) + len(config.train.ema_power_widths)


def checkpoint_bytes(parameters: int, averages: int) -> int:
    """Bytes of one checkpoint: weights, AdamW's moments and averages in float32."""
    return FLOAT32 * parameters * (1 + MOMENTS + averages)


def network_bytes(
    parameters: int, stage: int, processes: int, micro_batches: int, number: int = BFLOAT16
) -> float:
    """Bytes that one device sends per step by ring collectives; `number` is the bytes of one number.

    As counted in DeepSpeed 0.19: ZeRO 1 all-reduces the gradients once a step (two passes of the ring) and
    all-gathers the weights (one pass); ZeRO 2 all-reduces the gradients of each micro-batch; ZeRO 3
    reduce-scatters the gradients and all-gathers the weights, one pass each, for each micro-batch.
    """
    passes = {1: 2 + 1, 2: 2 * micro_batches + 1, 3: micro_batches * (1 + 1)}[stage]
    return number * parameters * passes * (processes - 1) / processes


def memory_bytes(
    parameters: int, averages: int, stage: int, processes: int, micro_batches: int, number: int = BFLOAT16
) -> float:
    """Bytes on one device: weights (`number` bytes each), gradients, and float32 optimizer and averages.

    The optimizer has its own copy of the weights, also in float32 training, and uses float32 gradients. ZeRO
    1 shards the optimizer, but keeps full gradients in the weights' dtype, and full float32 sums if there are
    several micro-batches. ZeRO 2 shards the gradients as well, ZeRO 3 also the weights. The averages are
    sharded like the optimizer's weights.
    """
    optimizer = FLOAT32 * (1 + MOMENTS + averages) / processes
    gradients = FLOAT32 / processes
    if stage == 1:
        gradients = number + FLOAT32 / (processes if micro_batches == 1 else 1)
    weights = number / (processes if stage >= 3 else 1)
    return parameters * (optimizer + gradients + weights)


def cost_checks(config: RunConfig, cost: TrainingCost, to: Cluster) -> list[Check]:
    """The cost as lines for the terminal."""
    train = config.train
    full = cost.images_per_s / to.mfu / to.processes
    lines = {
        "parameters": f"{cost.parameters:,}",
        "FLOPs": f"{cost.forward_flops / 1e9:,.1f} G forward and {cost.training_flops / 1e9:,.1f} G in "
        f"training for an image; {cost.total_flops:.3g} for {train.images:,} images",
        "images/s": f"{cost.images_per_s:,.0f}, {cost.images_per_s / to.processes:,.1f} a device, at an MFU "
        f"of {to.mfu:.0%} (100%: {full:,.0f} a device at {to.peak / 1e12:,.0f} TFLOP/s)",
        "time": f"{cost.seconds / DAY:,.2f} days for {cost.steps:,} steps of {train.global_batch:,} images, "
        f"{cost.step_seconds:.3f} s each; saving and evaluation not counted",
        "loader": f"{cost.images_per_s / to.hosts:,.0f} images/s, {size(cost.loader_bytes_per_s)}/s, on "
        "each host",
        "checkpoint": f"{size(cost.checkpoint_bytes)}, {cost.checkpoint_seconds:,.1f} s at "
        f"{size(to.store_rate)}/s, {cost.checkpoints:,} times; training goes on while it is copied",
        "storage": f"{size(cost.storage_bytes)}: {train.keep_checkpoints} checkpoints, "
        f"{config.sample.images:,} samples, besides the data set's {cost.image_bytes:,} bytes per image",
    }
    for stage, sent in cost.network_bytes.items():
        lines[f"network, ZeRO {stage}"] = (
            f"{size(sent)} sent by each device in a step, {size(sent / cost.step_seconds)}/s"
        )
    for stage, held in cost.memory_bytes.items():
        lines[f"memory, ZeRO {stage}"] = f"{size(held)} on each device, and the activations"
    return [Check(name, True, detail) for name, detail in lines.items()]


def size(count: float) -> str:
    """Bytes with a unit for display, e.g. 4.72 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
