"""One flow per stage, to run a stage on its own or on other machines."""

from typing import Annotated, Any, cast

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.task_runners import ProcessPoolTaskRunner

from flows.cancellation import end_remaining_jobs
from flows.parallel_runs import write_shards_in_parallel
from flows.pipeline import pipeline, run_name
from flows.presets import DIGITS, PIPELINE
from fm_core.config import RunConfig
from fm_core.run.resource_limits import available_cores

SHARD, STAGE = DIGITS.form("run", "data"), DIGITS.form(*PIPELINE)
# Prefect's default is every core of the machine.
POOL_WORKERS = get_current_settings().tasks.runner.process_pool_max_workers or available_cores()


@flow(
    name="shard-dataset",
    flow_run_name=run_name,
    retries=0,
    on_cancellation=[end_remaining_jobs],
    task_runner=cast(Any, ProcessPoolTaskRunner(max_workers=POOL_WORKERS)),
)
def shard_dataset(config: Annotated[RunConfig, SHARD] = DIGITS.values) -> State[Any]:
    """Write a data set as checksummed shards with a manifest, under `<data.root>/<data.name>`.

    Runs one task per shard, or per archive if the archive can only be read sequentially; as many at a time as
    the process may use cores (`PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS`), or up to 2,000 images in the
    process of the flow. Flow runs of several workers on the same data set share the work: each processes the
    shards in its own random order and skips those that another has already written. A shard that is written
    twice has the same bytes.
    """
    return pipeline(config, ["shard"], before=write_shards_in_parallel)


@flow(name="train-model", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def train_model(config: Annotated[RunConfig, STAGE] = DIGITS.values) -> State[Any]:
    """Train on the shards, starting from the newest complete checkpoint of `<run.root>/<run.name>`."""
    return pipeline(config, ["train"])


@flow(name="sample-images", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def sample_images(config: Annotated[RunConfig, STAGE] = DIGITS.values) -> State[Any]:
    """Sample images from a checkpoint of `<run.root>/<run.name>`."""
    return pipeline(config, ["sample"])


@flow(name="evaluate-model", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def evaluate_model(config: Annotated[RunConfig, STAGE] = DIGITS.values) -> State[Any]:
    """Score the samples of `<run.root>/<run.name>` and update its report."""
    return pipeline(config, ["evaluate", "report"])
