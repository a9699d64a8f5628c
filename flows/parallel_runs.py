"""Shards of one data set written by many processes: a Prefect task for each piece of the work."""

import random
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.progress import ProgressReport
from fm_core.config import DataSection, RunConfig
from fm_core.errors import UserError
from fm_core.run.progress import Progress, RateMeter

LOOK_SECONDS = 3.0
"""What is written is counted this often."""


def write_shards_in_parallel(config: RunConfig) -> None:
    """Write every shard that is missing; the flow's task runner says how many pieces at a time.

    Each flow run has an order of its own, so that those of several workers seldom write the same. What is
    missing afterwards is nothing: the stage `shard` then writes the manifest. Raises UserError for the
    first piece that was refused.
    """
    from fm_core.data.parallel_sharding import begin_dataset

    data = DataSection.model_validate(config.data.model_dump())  # the flow's own class cannot travel
    work = begin_dataset(data)
    if work is None:
        return
    pieces = random.Random(flow_run.get_id()).sample(work.pieces, len(work.pieces))
    futures = [
        _write_piece.with_options(name=piece.name, task_run_name=piece.name).submit(data, piece.shards)
        for piece in pieces
    ]
    pace = RateMeter()
    with ProgressReport("shard", config) as show:
        for future in futures:
            while not future.state.is_final():
                future.wait(LOOK_SECONDS)
                written = work.written()
                message = f"writing shards in {len(pieces)} tasks"
                show(Progress("shard", written, work.images, "images", message, pace.rate(written)))
    for future in futures:
        if not future.state.is_completed():
            raise UserError(future.state.message or "a piece was not written")


@task(cache_policy=NO_CACHE, persist_result=False)
def _write_piece(data: DataSection, shards: tuple[str, ...]) -> State[Any]:
    """Write some shards."""
    from fm_core.data.parallel_sharding import write_piece

    try:
        images = write_piece(data, shards)
    except UserError as error:
        return State(type=StateType.FAILED, message=str(error))
    get_run_logger().info("%s: %d images", shards[0], images)
    return Completed(message=f"{images:,} images" if images else "written meanwhile by another")
