"""The paper's comparison as flows: in 2-D, and for each data set of images."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State

from flows.cancellation import end_remaining_jobs
from flows.pipeline import pipeline, run_name
from flows.presets import (
    CHECKERBOARD,
    REPRODUCE_CIFAR10,
    REPRODUCE_DIGITS,
    REPRODUCE_IMAGENET32,
    REPRODUCE_IMAGENET64,
    Checkerboard,
    ReproduceCifar10,
    ReproduceDigits,
    ReproduceImageNet32,
    ReproduceImageNet64,
)
from fm_core.commands import estimate
from fm_core.config import RunConfig


def say_cost(config: RunConfig) -> None:
    """Write a line to the run's log of what the comparison will take. UserError if it cannot be run so."""
    get_run_logger().info("%s", estimate(config).headline)


def compared(config: RunConfig) -> State[Any]:
    """Say what the comparison will take, and make it."""
    return pipeline(config, ["reproduce"], before=say_cost)


@flow(name="reproduce-paper", flow_run_name=run_name, on_cancellation=[end_remaining_jobs])
def reproduce_paper(config: Checkerboard = CHECKERBOARD) -> State[Any]:
    """Train, score and draw every objective of the paper's comparison, one experiment after another.

    * **in**: nothing for the 2-D checkerboard: 19 minutes of one CPU core
    * **out**: `<run.root>/<run.name>/reproduce` with `report.html` and `results.json`
    * **again**: a run of the same `run.name` makes what is missing, and continues an interrupted experiment
    """
    return compared(config)


@flow(name="reproduce-digits", flow_run_name=run_name, on_cancellation=[end_remaining_jobs])
def reproduce_digits(config: ReproduceDigits = REPRODUCE_DIGITS) -> State[Any]:
    """The paper's comparison on scikit-learn's handwritten digits: each objective is a run of its own.

    * **in**: nothing
    * **out**: `<run.root>/<run.name>/reproduce` with the runs, `report.html` and `results.json`
    * **again**: a run of the same `run.name` continues where the last one ended
    """
    return compared(config)


@flow(name="reproduce-cifar10", flow_run_name=run_name, on_cancellation=[end_remaining_jobs])
def reproduce_cifar10(config: ReproduceCifar10 = REPRODUCE_CIFAR10) -> State[Any]:
    """The paper's comparison on CIFAR-10, with its hyper-parameters; the run's log says what it will take.

    * **in**: `config.data.source.url`, the folder that holds `cifar-10-python.tar.gz`
    * **out**: `<run.root>/<run.name>/reproduce` with the runs, `report.html` and `results.json`
    * **again**: a run of the same `run.name` continues where the last one ended
    """
    return compared(config)


@flow(name="reproduce-imagenet32", flow_run_name=run_name, on_cancellation=[end_remaining_jobs])
def reproduce_imagenet32(config: ReproduceImageNet32 = REPRODUCE_IMAGENET32) -> State[Any]:
    """The paper's comparison on ImageNet at 32 x 32 pixels, with its hyper-parameters.

    * **in**: `config.data.source.url`, the folder that holds the archives, as for `train-imagenet32`
    * **out**: `<run.root>/<run.name>/reproduce` with the runs, `report.html` and `results.json`
    * **again**: a run of the same `run.name` continues where the last one ended
    """
    return compared(config)


@flow(name="reproduce-imagenet64", flow_run_name=run_name, on_cancellation=[end_remaining_jobs])
def reproduce_imagenet64(config: ReproduceImageNet64 = REPRODUCE_IMAGENET64) -> State[Any]:
    """The paper's comparison on ImageNet at 64 x 64 pixels, with its hyper-parameters.

    * **in**: `config.data.source.url`, the folder that holds the archives, as for `train-imagenet64`
    * **out**: `<run.root>/<run.name>/reproduce` with the runs, `report.html` and `results.json`
    * **again**: a run of the same `run.name` continues where the last one ended
    """
    return compared(config)
