"""Each stage as a flow of its own, for one step of a run or a machine of its own."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.pipeline import pipeline, run_name
from flows.presets import DIGITS, Digits


@flow(name="shard-dataset", flow_run_name=run_name)
def shard_dataset(config: Digits = DIGITS) -> State[Any]:
    """Write a data set as checksummed shards with a manifest, under `<data.root>/<data.name>`."""
    return pipeline(config, ["shard"])


@flow(name="train-model", flow_run_name=run_name)
def train_model(config: Digits = DIGITS) -> State[Any]:
    """Train on the shards, from the newest complete checkpoint of `<run.root>/<run.name>` on."""
    return pipeline(config, ["train"])


@flow(name="sample-images", flow_run_name=run_name)
def sample_images(config: Digits = DIGITS) -> State[Any]:
    """Draw images from a checkpoint of `<run.root>/<run.name>`."""
    return pipeline(config, ["sample"])


@flow(name="evaluate-model", flow_run_name=run_name)
def evaluate_model(config: Digits = DIGITS) -> State[Any]:
    """Score the samples of `<run.root>/<run.name>` and renew its report."""
    return pipeline(config, ["evaluate", "report"])
