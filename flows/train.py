"""Flows of the full pipeline, from images to scores: one for each data set."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.cancellation import end_remaining_jobs
from flows.pipeline import ALL_STAGES, pipeline, run_name
from flows.presets import DIGITS, IMAGENET32, IMAGENET64, Digits, ImageNet32, ImageNet64
from flows.subflows import Apart


@flow(name="train-digits", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def train_digits(config: Digits = DIGITS, apart: tuple[Apart, ...] = ()) -> State[Any]:
    """Shard, train, sample, score and report scikit-learn's handwritten digits.

    1,797 images of 8 x 8 pixels that come with scikit-learn. Takes minutes on two CPU cores and less than
    1 GB of disk.

    * **input**: none; `config` has runnable defaults
    * **output**: the run directory `<run.root>/<run.name>` with shards, checkpoints, samples, scores
      and `report.html`
    * **rerun**: a run with the same `run.name` continues where the last one ended and verifies what is
      complete
    * **apart**: stages to run as flow runs of their own deployments, in those deployments' work pools
    """
    return pipeline(config, ALL_STAGES, apart)


@flow(name="train-imagenet32", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def train_imagenet32(config: ImageNet32 = IMAGENET32, apart: tuple[Apart, ...] = ()) -> State[Any]:
    """Shard, train, sample, score and report ImageNet at 32 x 32 pixels.

    The network and the hyper-parameters of Lipman et al. (ICLR 2023).

    * **input**: `config.data.source.url`, the folder with the archives of downsampled ImageNet
      (Chrabaszcz et al.) in npz format; a run without them is refused within seconds
    * **output**: the run directory `<run.root>/<run.name>` with shards, checkpoints, samples, scores
      and `report.html`
    * **rerun**: a run with the same `run.name` continues where the last one ended and verifies what is
      complete
    * **apart**: stages to run as flow runs of their own deployments, in those deployments' work pools
    """
    return pipeline(config, ALL_STAGES, apart)


@flow(name="train-imagenet64", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def train_imagenet64(config: ImageNet64 = IMAGENET64, apart: tuple[Apart, ...] = ()) -> State[Any]:
    """Shard, train, sample, score and report ImageNet at 64 x 64 pixels.

    The network and the hyper-parameters of Lipman et al. (ICLR 2023).

    * **input**: `config.data.source.url`, the folder with the archives of downsampled ImageNet
      (Chrabaszcz et al.) in npz format; a run without them is refused within seconds
    * **output**: the run directory `<run.root>/<run.name>` with shards, checkpoints, samples, scores
      and `report.html`
    * **rerun**: a run with the same `run.name` continues where the last one ended and verifies what is
      complete
    * **apart**: stages to run as flow runs of their own deployments, in those deployments' work pools
    """
    return pipeline(config, ALL_STAGES, apart)
