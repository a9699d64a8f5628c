"""Training's numbers for other people's instruments: Prometheus, TensorBoard, Weights & Biases.

metrics.jsonl is the record; these are copies of its lines. One that cannot be written (a full disk, a service
that is away) never stops training: it says so once in the log.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig, TrainSection
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory, identity
from fm_core.storage.hashing import fingerprint

MetricLogger = Callable[[Mapping[str, Any]], None]

GAUGES = {
    "step": "Optimizer steps.",
    "images_seen": "Images seen.",
    "loss": "Mean training loss of the last interval.",
    "lr": "Learning rate.",
    "grad_norm": "Norm of the gradient of the last step, before clipping.",
    "images_per_s": "Images per second over the last interval.",
    "seconds": "Seconds spent in training, over all sessions.",
    "data_seconds": "Seconds of the last interval spent waiting for data.",
    "skipped_steps": "Optimizer steps that were skipped.",
    "rollbacks": "How often training went back to a checkpoint because steps could not be applied.",
    "memory_bytes": "Most memory that a device has held, in bytes; without a GPU that of a process now.",
    "tflops_per_device": "TFLOP/s of one device in the network's operations over the last interval.",
    "mfu": "Share of the device's peak that these are, where the peak is known.",
    "held_out_loss": "Loss on the held-out images of the last checkpoint, at fixed times and noise.",
    "loss_quarter_1": "Mean loss of the last interval at times in the first quarter, the noisiest.",
    "loss_quarter_2": "Mean loss of the last interval at times in the second quarter.",
    "loss_quarter_3": "Mean loss of the last interval at times in the third quarter.",
    "loss_quarter_4": "Mean loss of the last interval at times in the last quarter, next to the data.",
}
"""Numbers of metrics.jsonl and held_out.jsonl that are exported, with what Prometheus says of them."""


def check_loggers(train: TrainSection) -> None:
    """Refuse what is asked for and cannot be: a package that is not installed, a directory that is not there.

    Raises UserError.
    """
    for key, package, wanted in (
        ("tensorboard", "tensorboardX", train.tensorboard),
        ("wandb", "wandb", train.wandb),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{key}: the package {package} is not installed; pip install {package}")
    if train.prometheus and not Path(train.prometheus).is_dir():
        raise UserError(
            f"train.prometheus: {train.prometheus} is no directory; name the one that node_exporter's "
            "--collector.textfile.directory names"
        )


class MetricLoggers:
    """What each metrics line is copied to; made on rank 0 alone, and opened with the first line."""

    def __init__(self, config: RunConfig) -> None:
        train, run = config.train, config.run.name
        self._makers: dict[str, Callable[[], MetricLogger]] = {}
        self._opened: dict[str, MetricLogger] = {}
        if directory := train.prometheus:
            path = Path(directory) / f"flow-matching-{run}.prom"
            self._makers["prometheus"] = lambda: prometheus(path, run, train.images)
        if train.tensorboard:
            self._makers["tensorboard"] = lambda: tensorboard(
                RunDirectory(config).path / "train" / "tensorboard"
            )
        if train.wandb:
            self._makers["wandb"] = lambda: wandb(config)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Copy one line of metrics.jsonl, or a measurement of the held-out loss."""
        quarters = enumerate(record.get("loss_by_quarter_of_t", ()), start=1)
        numbers = {**record, **{f"loss_quarter_{number}": loss for number, loss in quarters}}
        values = {key: numbers[key] for key in GAUGES if numbers.get(key) is not None}
        for name, make in list(self._makers.items()):
            try:
                if name not in self._opened:
                    self._opened[name] = make()
                self._opened[name](values)
            except Exception as error:
                print(f"WARNING: no more {name} export: {error}", flush=True)
                del self._makers[name]


def prometheus(path: Path, run: str, images: int) -> MetricLogger:
    """The newest values, in a file for node_exporter's textfile collector; replaced atomically."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()
    gauges = {
        key: Gauge(f"flow_matching_{key}", meaning, ["run"], registry=registry)
        for key, meaning in GAUGES.items()
    }
    goal = Gauge("flow_matching_images_goal", "Images to see (train.images).", ["run"], registry=registry)
    written = Gauge("flow_matching_written", "When this was written, Unix time.", ["run"], registry=registry)
    goal.labels(run).set(images)

    def export(values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            gauges[key].labels(run).set(value)
        written.labels(run).set_to_current_time()
        write_to_textfile(str(path), registry)

    return export


def tensorboard(directory: Path) -> MetricLogger:
    """Every value against images seen, in TensorBoard's event files."""
    library: Any = importlib.import_module("tensorboardX")
    writer: Any = None

    def export(values: Mapping[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            # A session that continues hides what an earlier one wrote of the same images. Its file's name has
            # seconds alone; its thread writes at once, as ranks do not wait for threads when they end.
            suffix = f".{time.time_ns()}"
            purge = values["images_seen"]
            writer = library.SummaryWriter(
                str(directory), purge_step=purge, flush_secs=0, filename_suffix=suffix
            )
        for key, value in values.items():
            writer.add_scalar(f"train/{key}", value, values["images_seen"])

    return export


def wandb(config: RunConfig) -> MetricLogger:
    """Every value against images seen, at Weights & Biases; credentials come from the environment.

    A run that continues goes on in the same curve; another of the same name has one of its own.
    """
    service: Any = importlib.import_module("wandb")
    run = service.init(
        project=config.train.wandb,
        id=f"{config.run.name}-{fingerprint(identity(config))[:8]}",
        name=config.run.name,
        resume="allow",
        dir=str(RunDirectory(config).path / "train"),
        config=config.model_dump(mode="json"),
    )
    run.define_metric("*", step_metric="images_seen")

    def export(values: Mapping[str, Any]) -> None:
        run.log(dict(values))

    return export
