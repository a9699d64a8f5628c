"""Shards of one data set written by many processes: a Prefect task for each part of the source."""

from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.states import Completed

from fm_core.config import DataSection, RunConfig
from fm_core.errors import UserError


def write_parts(config: RunConfig) -> None:
    """Write every part that is not whole yet; the flow's task runner says how many at a time.

    What is missing afterwards is nothing: the stage `shard` then writes the manifest. Raises UserError
    for the first part that was refused.
    """
    from fm_core.data.fan_out import begin_dataset

    data = DataSection.model_validate(config.data.model_dump())  # the flow's own class cannot travel
    futures = [
        _write_part.with_options(name=part, task_run_name=part).submit(data, part)
        for part in begin_dataset(data)
    ]
    states = [future.wait() or future.state for future in futures]
    for state in states:
        if not state.is_completed():
            raise UserError(state.message or "a part was not written")


@task(cache_policy=NO_CACHE, persist_result=False)
def _write_part(data: DataSection, part: str) -> State[Any]:
    """Write one part of the source."""
    from fm_core.data.fan_out import write_named_part

    try:
        images = write_named_part(data, part)
    except UserError as error:
        return State(type=StateType.FAILED, message=str(error))
    get_run_logger().info("%s: %d images", part, images)
    return Completed(message=f"{images:,} images")
