"""Flows of the paper's comparison: in two dimensions, and on each image data set."""

from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State

from flows.cancellation import end_remaining_jobs
from flows.pipeline import pipeline, run_name
from flows.presets import (
    CHECKERBOARD,
    PIPELINE,
    REPRODUCE_CIFAR10,
    REPRODUCE_DIGITS,
    REPRODUCE_IMAGENET32,
    REPRODUCE_IMAGENET64,
)
from fm_core.commands import estimate
from fm_core.config import RunConfig

SECTIONS = (*PIPELINE, "reproduce")
SECTIONS_2D = ("run", "launch", "report", "reproduce")


def log_cost_estimate(config: RunConfig) -> None:
    """Log one line with the estimated cost. UserError if the comparison cannot run as configured."""
    get_run_logger().info("%s", estimate(config).headline)


def run_comparison(config: RunConfig) -> State[Any]:
    """Log the estimated cost, then run the comparison."""
    return pipeline(config, ["reproduce"], before=log_cost_estimate)


@flow(name="reproduce-paper", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def reproduce_paper(
    config: Annotated[RunConfig, CHECKERBOARD.form(*SECTIONS_2D)] = CHECKERBOARD.values,
) -> State[Any]:
    """Train, score and plot every objective of the paper's comparison, one experiment after another.

    * **input**: none for the two-dimensional checkerboard; it takes 19 minutes on one CPU core
    * **output**: `<run.root>/<run.name>/reproduce` with `report.html` and `results.json`
    * **rerun**: a run with the same `run.name` does what is missing and continues an interrupted experiment
    """
    return run_comparison(config)


@flow(name="reproduce-digits", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def reproduce_digits(
    config: Annotated[RunConfig, REPRODUCE_DIGITS.form(*SECTIONS)] = REPRODUCE_DIGITS.values,
) -> State[Any]:
    """The paper's comparison on scikit-learn's handwritten digits, with one run per objective.

    * **input**: none
    * **output**: `<run.root>/<run.name>/reproduce` with the runs, `report.html` and `results.json`
    * **rerun**: a run with the same `run.name` continues where the last one ended
    """
    return run_comparison(config)


@flow(name="reproduce-cifar10", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def reproduce_cifar10(
    config: Annotated[RunConfig, REPRODUCE_CIFAR10.form(*SECTIONS)] = REPRODUCE_CIFAR10.values,
) -> State[Any]:
    """The paper's comparison on CIFAR-10, with its hyper-parameters; the estimated cost is logged.

    * **input**: `config.data.source.url`, the folder with `cifar-10-python.tar.gz`
    * **output**: `<run.root>/<run.name>/reproduce` with the runs, `report.html` and `results.json`
    * **rerun**: a run with the same `run.name` continues where the last one ended
    """
    return run_comparison(config)


@flow(name="reproduce-imagenet32", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def reproduce_imagenet32(
    config: Annotated[RunConfig, REPRODUCE_IMAGENET32.form(*SECTIONS)] = REPRODUCE_IMAGENET32.values,
) -> State[Any]:
    """The paper's comparison on ImageNet at 32 x 32 pixels, with its hyper-parameters.

    * **input**: `config.data.source.url`, the folder with the archives, as for `train-imagenet32`
    * **output**: `<run.root>/<run.name>/reproduce` with the runs, `report.html` and `results.json`
    * **rerun**: a run with the same `run.name` continues where the last one ended
    """
    return run_comparison(config)


@flow(name="reproduce-imagenet64", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def reproduce_imagenet64(
    config: Annotated[RunConfig, REPRODUCE_IMAGENET64.form(*SECTIONS)] = REPRODUCE_IMAGENET64.values,
) -> State[Any]:
    """The paper's comparison on ImageNet at 64 x 64 pixels, with its hyper-parameters.

    * **input**: `config.data.source.url`, the folder with the archives, as for `train-imagenet64`
    * **output**: `<run.root>/<run.name>/reproduce` with the runs, `report.html` and `results.json`
    * **rerun**: a run with the same `run.name` continues where the last one ended
    """
    return run_comparison(config)
