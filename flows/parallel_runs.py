"""Parallel sharding: one Prefect task per piece of a data set, in processes of the flow's task runner."""

import random
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.progress_report import ProgressReport
from fm_core.config import DataSection, RunConfig
from fm_core.errors import UserError
from fm_core.run.progress import Progress, RateMeter

FEW_IMAGES = 2_000
"""Images up to which the process of the flow writes the shards; starting another one takes longer."""
POLL_SECONDS = 3.0
"""Interval between two counts of the images written."""


def write_shards_in_parallel(config: RunConfig) -> None:
    """Write every missing shard; the flow's task runner sets how many pieces are written at a time.

    Each flow run processes the pieces in its own random order, so that flow runs of several workers rarely
    write the same one. Afterwards no shard is missing, and the stage `shard` writes the manifest. Raises
    UserError for the first piece that failed.
    """
    from fm_core.data.parallel_sharding import begin_dataset

    data = DataSection.model_validate(
        config.data.model_dump()
    )  # instances of the flow's generated class cannot be pickled
    work = begin_dataset(data)
    if work is None:
        return
    pieces = random.Random(flow_run.get_id()).sample(work.pieces, len(work.pieces))
    tasks = [
        (_write_piece.with_options(name=piece.name, task_run_name=piece.name), piece.shards)
        for piece in pieces
    ]
    if work.images <= FEW_IMAGES:
        for write, shards in tasks:
            _require_written(write(data, shards, return_state=True))
        return
    futures = [write.submit(data, shards) for write, shards in tasks]
    rate_meter = RateMeter()
    with ProgressReport("shard", config) as report:
        for future in futures:
            while not future.state.is_final():
                wait_for(future)
                written = work.written()
                message = f"writing shards in {len(pieces)} tasks"
                report(Progress("shard", written, work.images, "images", message, rate_meter.rate(written)))
        for future in futures:
            _require_written(future.state)


def wait_for(future: PrefectFuture[Any]) -> None:
    """Wait for some seconds. Raises UserError if a process of the pool was killed."""
    try:
        future.wait(POLL_SECONDS)
    except BrokenProcessPool:
        raise UserError(
            "a process that writes shards was killed, perhaps for lack of memory; its shards remain: "
            "run the flow again, with fewer processes in PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS"
        ) from None


def _require_written(state: State[Any]) -> None:
    if not state.is_completed():
        raise UserError(state.message or "a piece of the data set was not written")


@task(cache_policy=NO_CACHE, persist_result=False, retries=0)
def _write_piece(data: DataSection, shards: tuple[str, ...]) -> State[Any]:
    """Write some shards."""
    from fm_core.data.parallel_sharding import write_piece

    try:
        images = write_piece(data, shards)
    except UserError as error:
        return State(type=StateType.FAILED, message=str(error))
    get_run_logger().info("%s: %d images", shards[0], images)
    return Completed(message=f"{images:,} images" if images else "already written by another process")
