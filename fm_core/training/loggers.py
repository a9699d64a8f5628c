"""Metric loggers: Prometheus, TensorBoard, Weights & Biases.

metrics.jsonl is the authoritative record; loggers get copies of its lines. A logger that fails (a full disk,
an unavailable service) does not stop training; it is reported once and disabled.
"""

import importlib
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig, TrainSection
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory, identity
from fm_core.storage.hashing import fingerprint
from fm_core.storage.keyed_random import UNNAMED

LOG = logging.getLogger(__name__)

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
    "rollbacks": "How often training rolled back to a checkpoint because steps could not be applied.",
    "memory_bytes": "Peak memory of a device in bytes; without a GPU the current memory of a process.",
    "tflops_per_device": "Model TFLOP/s of one device over the last interval.",
    "mfu": "Model FLOPs utilization: that rate over the device's peak, where the peak is known.",
    "held_out_loss": "Validation loss of the last checkpoint, at fixed times and noise.",
    "loss_quarter_1": "Mean loss of the last interval at times in the first quarter, the noisiest.",
    "loss_quarter_2": "Mean loss of the last interval at times in the second quarter.",
    "loss_quarter_3": "Mean loss of the last interval at times in the third quarter.",
    "loss_quarter_4": "Mean loss of the last interval at times in the last quarter, next to the data.",
}
"""Exported values of metrics.jsonl and held_out.jsonl, with their help texts in Prometheus."""


def check_loggers(train: TrainSection) -> None:
    """Check the packages and the directory that the loggers need. Raises UserError for a missing one."""
    for key, package, enabled in (
        ("tensorboard", "tensorboardX", train.tensorboard),
        ("wandb", "wandb", train.wandb),
    ):
        if enabled and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{key}: the package {package} is not installed; pip install {package}")
    if train.prometheus and not Path(train.prometheus).is_dir():
        raise UserError(
            f"train.prometheus: {train.prometheus} is not a directory; name the one that node_exporter's "
            "--collector.textfile.directory names"
        )


class MetricLoggers:
    """The loggers of a configuration, on rank 0 only; each is opened at its first line."""

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
        """Log one line of metrics.jsonl, or a measurement of the validation loss."""
        quarters = enumerate(record.get("loss_by_quarter_of_t", ()), start=1)
        numbers = {**record, **{f"loss_quarter_{number}": loss for number, loss in quarters}}
        values = {key: numbers[key] for key in GAUGES if numbers.get(key) is not None}
        for name, make in list(self._makers.items()):
            try:
                if name not in self._opened:
                    self._opened[name] = make()
                self._opened[name](values)
            except Exception as error:
                LOG.warning("the %s logger is disabled: %s", name, error)
                del self._makers[name]


def prometheus(path: Path, run: str, images: int) -> MetricLogger:
    """Logger of the newest values, in a file for node_exporter's textfile collector; replaced atomically."""
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
    """Logger of every value against images seen, in TensorBoard's event files."""
    # EventsWriter writes synchronously. The thread of a SummaryWriter loses the last lines when a rank exits,
    # and with flush_secs=0 it keeps one core busy.
    writers: Any = importlib.import_module("tensorboardX.event_file_writer")
    events: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    summary: Any = importlib.import_module("tensorboardX.summary")
    directory.mkdir(parents=True, exist_ok=True)
    # File names have a resolution of seconds; the suffix distinguishes sessions within one second.
    writer: Any = writers.EventsWriter(str(directory / "events"), f".{time.time_ns()}")
    started = False

    def export(values: Mapping[str, Any]) -> None:
        nonlocal started
        step = values["images_seen"]
        if not started:  # makes TensorBoard hide what an earlier session wrote from this step on
            start = events.SessionLog(status=events.SessionLog.START)
            writer.write_event(events.Event(wall_time=time.time(), step=step, session_log=start))
            started = True
        for key, value in values.items():
            scalar = summary.scalar(f"train/{key}", value)
            writer.write_event(events.Event(wall_time=time.time(), step=step, summary=scalar))
        writer.flush()

    return export


def _identity(config: RunConfig) -> dict[str, Any]:
    """The identity of a run, in the form in which its version recorded it."""
    known = identity(config)
    if known["run"]["generator"] == UNNAMED:
        del known["run"]["generator"]
    return known


def wandb(config: RunConfig) -> MetricLogger:
    """Logger of every value against images seen, at Weights & Biases; credentials come from the environment.

    A resumed run continues its curve; another run of the same name has its own.
    """
    service: Any = importlib.import_module("wandb")
    run = service.init(
        project=config.train.wandb,
        id=f"{config.run.name}-{fingerprint(_identity(config))[:8]}",
        name=config.run.name,
        resume="allow",
        dir=str(RunDirectory(config).path / "train"),
        config=config.model_dump(mode="json"),
    )
    run.define_metric("*", step_metric="images_seen")

    def export(values: Mapping[str, Any]) -> None:
        run.log(dict(values))

    return export
