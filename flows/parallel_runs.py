"""Parallel sharding: one Prefect task per piece of a data set, in processes of the flow's task runner."""

import random
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.progress_report import ProgressReport
from fm_core.config import DataSection, RunConfig
from fm_core.errors import UserError
from fm_core.run.progress import Progress, RateMeter

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
    futures = [
        _write_piece.with_options(name=piece.name, task_run_name=piece.name).submit(data, piece.shards)
        for piece in pieces
    ]
    rate_meter = RateMeter()
    with ProgressReport("shard", config) as report:
        for future in futures:
            while not future.state.is_final():
                future.wait(POLL_SECONDS)
                written = work.written()
                message = f"writing shards in {len(pieces)} tasks"
                report(Progress("shard", written, work.images, "images", message, rate_meter.rate(written)))
        for future in futures:
            if not future.state.is_completed():
                raise UserError(future.state.message or "a piece of the data set was not written")


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
