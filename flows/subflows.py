"""Stages as flow runs of their own deployments, in the work pools of those deployments."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, cast
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
    "sweep-point": "sweep-point/default",
}
"""Deployment of each stage, and of the points of a sweep."""
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
    started = time.monotonic()
    name = f"{stage}-{of}" if of else stage
    (child,) = run_subflows(stage, {name: {"config": config.model_dump(mode="json")}})
    outcome, message = outcome_of_run(child)
    if outcome is not Outcome.DONE:
        raise StageEndedError(outcome, f"{stage}: {message}")
    return StageResult(
        stage=stage,
        state="verified" if NOTHING_TO_DO in message else "done",
        seconds=round(time.monotonic() - started, 3),
        summary=message.split("; report: ")[0].removesuffix(f"; {NOTHING_TO_DO}"),
    )


def outcome_of_run(child: FlowRun) -> tuple[Outcome, str]:
    """Outcome and message of a flow run that has ended."""
    if child.state is None:
        return Outcome.FAILED, "its flow run has no state"
    return Outcome.from_prefect_state(child.state.type.value), child.state.message or ""


def run_subflows(
    stage: str,
    parameters: Mapping[str, Mapping[str, Any]],
    report: Callable[[int], None] = lambda ended: None,
) -> list[FlowRun]:
    """Run a deployment with each of several parameters until all have ended; return the flow runs.

    They run at the same time, as far as their work pool has free slots. An exception, also of `report`,
    cancels those that have not ended.

    Args:
        stage: key of DEPLOYMENTS.
        parameters: parameters by a name that is part of the idempotency key.
        report: called after each poll with the number of flow runs that have ended.
    """
    children: dict[str, FlowRun] = {}
    try:
        for name, values in parameters.items():
            children[name] = _created(stage, name, values)
        _wait_for_all(children, report)
    except BaseException:
        _cancel(list(children.values()))
        raise
    return list(children.values())


def _created(stage: str, name: str, parameters: Mapping[str, Any]) -> FlowRun:
    """Create a flow run, or schedule the one that an earlier attempt created again."""
    created = run_deployment(
        DEPLOYMENTS[stage],
        parameters=dict(parameters),
        timeout=0,
        idempotency_key=f"{flow_run.get_id()}-{name}",
    )
    child = cast(FlowRun, created)  # outside an event loop the call is not a coroutine
    if child.state and child.state.is_final():
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, Scheduled(), force=True)
            child = client.read_flow_run(child.id)
    get_run_logger().info("%s runs as flow run %s of %s", name, child.name, DEPLOYMENTS[stage])
    return child


def _cancel(children: Sequence[FlowRun]) -> None:
    """Cancel flow runs, and wait for their ends."""
    remaining = [child for child in children if not (child.state and child.state.is_final())]
    for child in remaining:
        # A failure, e.g. of one whose flow run was deleted, must not leave the others running.
        with suppress(Exception), get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, Cancelling(message=PARENT_CANCELLED))
    deadline = time.monotonic() + CANCEL_SECONDS
    for child in remaining:
        _wait_until_final(child, deadline - time.monotonic())


def _wait_for_all(children: dict[str, FlowRun], report: Callable[[int], None]) -> None:
    """Poll flow runs until all have ended; their last known states replace the first ones."""
    waits = {name: _Wait(child) for name, child in children.items()}
    while True:
        ended = 0
        for name, wait in waits.items():
            ended += wait.poll()
            children[name] = wait.child
        report(ended)
        if ended == len(waits):
            return
        time.sleep(POLL_SECONDS)


def _wait_until_final(child: FlowRun, seconds: float) -> None:
    """Poll a flow run until it has ended, for at most `seconds`."""
    wait, started = _Wait(child), time.monotonic()
    while time.monotonic() - started < seconds and not wait.poll():
        time.sleep(POLL_SECONDS)


class _Wait:
    """The wait for the end of one flow run."""

    def __init__(self, child: FlowRun) -> None:
        self.child = child
        """The flow run in its last known state."""
        self._started = self._last_alive = time.monotonic()
        self._ended = self._reported = False

    def poll(self) -> bool:
        """Read the state of the flow run, and return whether it has ended; a crash counts after a while."""
        if self._ended:
            return True
        try:
            with get_client(sync_client=True) as client:
                self.child = client.read_flow_run(self.child.id)
        except Exception as error:  # an unreachable server must not end the run
            get_run_logger().debug("could not read the state of %s: %s", self.child.name, error)
            return False
        state = self.child.state
        if not (state and state.is_crashed()):
            self._last_alive = time.monotonic()
        waits = state is None or state.is_scheduled() or state.is_pending()
        if waits and not self._reported and time.monotonic() - self._started > WAITING_SECONDS:
            self._reported = True
            get_run_logger().warning("%s", waiting_message(self.child))
        final = state is not None and state.is_final() and not state.is_crashed()
        self._ended = final or time.monotonic() - self._last_alive > CRASH_GRACE_SECONDS
        return self._ended


def waiting_message(child: FlowRun) -> str:
    """Message on why a flow run that was created has not started."""
    state = child.state.name if child.state else "not scheduled"
    pool = child.work_pool_name or "of its deployment"
    return (
        f"flow run {child.name} is still {state}: it waits for a worker or a free slot of the work pool "
        f"{pool}; see prefect work-pool inspect {pool}"
    )
