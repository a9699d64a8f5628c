"""Stages as flow runs of their own deployments, in the work pools of those deployments."""

import time
from collections.abc import Collection
from contextlib import suppress
from typing import Literal, cast
from uuid import UUID

from prefect import get_client, get_run_logger
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelling, Scheduled

from fm_core.config import RunConfig
from fm_core.errors import Outcome, StageEndedError, UserError
from fm_core.run.results import StageResult

Apart = Literal["shard", "train", "sample", "evaluate"]
DEPLOYMENTS = {
    "shard": "shard-dataset/default",
    "train": "train-model/default",
    "sample": "sample-images/default",
    "evaluate": "evaluate-model/default",
}
POLL_SECONDS = 2.0
CANCEL_SECONDS = 25.0
"""Seconds that a cancelled run waits for the flow run that it cancels in turn; Prefect kills it after 30."""
CRASH_GRACE_SECONDS = 60.0
"""Seconds that a flow run may be Crashed before it counts as failed, since its automation may start it again.
"""
WAITING_SECONDS = 60.0
"""Seconds after which a flow run that has not started is reported in the log, once."""
PARENT_CANCELLED = "its parent flow run was cancelled"
NOTHING_TO_DO = "nothing to do, everything was complete"


def check_slots(apart: Collection[str]) -> None:
    """Check that the work pools of these stages have a slot besides the one that this flow run occupies.

    Raises:
        UserError: a pool has only one slot, which this flow run would occupy while it waits for it.
    """
    if not apart:
        return
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(UUID(flow_run.get_id())).work_pool_name
        for stage in apart:
            pool = client.read_deployment_by_name(DEPLOYMENTS[stage]).work_pool_name
            if pool and pool == own and client.read_work_pool(pool).concurrency_limit == 1:
                raise UserError(
                    f"apart: {DEPLOYMENTS[stage]} is in the work pool {pool}, whose only slot this flow run "
                    f"holds; deploy it to another pool, or: prefect work-pool set-concurrency-limit {pool} 2"
                )


def run_subflow(stage: str, config: RunConfig, of: str = "") -> StageResult:
    """Run a stage's own deployment until it ends. StageEndedError if it does not complete.

    `of` distinguishes it from the same stage of another run in this flow run.

    A signal that ends this flow run first cancels the stage's flow run. When this flow run is started again,
    it reuses the flow run that it created the first time.
    """
    created = run_deployment(
        DEPLOYMENTS[stage],
        parameters={"config": config.model_dump(mode="json")},
        timeout=0,
        idempotency_key="-".join([str(flow_run.get_id()), stage, *([of] if of else [])]),
    )
    child = cast(FlowRun, created)  # outside an event loop the call is not a coroutine
    if child.state and child.state.is_final():
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, Scheduled(), force=True)
    get_run_logger().info("%s runs as flow run %s of %s", stage, child.name, DEPLOYMENTS[stage])
    started = time.monotonic()
    try:
        child = _wait_until_final(child)
    except BaseException:
        with suppress(Exception), get_client(sync_client=True) as client:  # the server may be unavailable
            client.set_flow_run_state(child.id, Cancelling(message=PARENT_CANCELLED))
        _wait_until_final(child, CANCEL_SECONDS)
        raise
    final = child.state
    if final is None or not final.is_completed():
        outcome = Outcome.from_prefect_state(final.type.value) if final else Outcome.FAILED
        message = final.message if final else "its flow run has no state"
        raise StageEndedError(outcome, f"{stage}: {message}")
    message = final.message or ""
    return StageResult(
        stage=stage,
        state="verified" if NOTHING_TO_DO in message else "done",
        seconds=round(time.monotonic() - started, 3),
        summary=message.split("; report: ")[0].removesuffix(f"; {NOTHING_TO_DO}"),
    )


def _wait_until_final(child: FlowRun, seconds: float = float("inf")) -> FlowRun:
    """Poll a flow run for at most `seconds` and return its last known state."""
    started = last_alive = time.monotonic()
    reported = False
    while time.monotonic() - started < seconds:
        time.sleep(POLL_SECONDS)
        try:
            with get_client(sync_client=True) as client:
                child = client.read_flow_run(child.id)
        except Exception as error:  # an unreachable server must not end the run
            get_run_logger().debug("could not read the state of %s: %s", child.name, error)
            continue
        if not (child.state and child.state.is_crashed()):
            last_alive = time.monotonic()
        waits = child.state is None or child.state.is_scheduled() or child.state.is_pending()
        if waits and not reported and time.monotonic() - started > WAITING_SECONDS:
            reported = True
            get_run_logger().warning("%s", waiting_message(child))
        if child.state and child.state.is_final() and not child.state.is_crashed():
            break
        if time.monotonic() - last_alive > CRASH_GRACE_SECONDS:
            break
    return child


def waiting_message(child: FlowRun) -> str:
    """Message on why a flow run that was created has not started."""
    state = child.state.name if child.state else "not scheduled"
    pool = child.work_pool_name or "of its deployment"
    return (
        f"flow run {child.name} is still {state}: it waits for a worker or a free slot of the work pool "
        f"{pool}; see prefect work-pool inspect {pool}"
    )
