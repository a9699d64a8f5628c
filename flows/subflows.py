"""Stages that run as flow runs of their own, in the work pools of their own deployments."""

import time
from typing import Literal, cast

from prefect import get_client, get_run_logger
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelling, Scheduled

from fm_core.config import RunConfig
from fm_core.errors import Outcome, StageEndedError
from fm_core.run.results import StageResult

Apart = Literal["shard", "train", "sample", "evaluate"]
DEPLOYMENTS = {
    "shard": "shard-dataset/default",
    "train": "train-model/default",
    "sample": "sample-images/default",
    "evaluate": "evaluate-model/default",
}
POLL_SECONDS = 2.0
END_SECONDS = 25.0
"""How long a cancelled run waits for the stage that it cancels; Prefect leaves it 30."""
RESUMED_SECONDS = 60.0
"""A stage that crashed is not lost before its automation had time to start it again."""
CASCADE = "the run that it is part of was cancelled"
NOTHING_TO_DO = "nothing to do, everything was complete"


def run_subflow(stage: str, config: RunConfig) -> StageResult:
    """Run a stage's own deployment to its end; raises StageEndedError as it ended.

    A signal that ends this run cancels that one first. This run started again takes up the flow run
    that it made the first time.
    """
    made = run_deployment(
        DEPLOYMENTS[stage],
        parameters={"config": config.model_dump(mode="json")},
        timeout=0,
        idempotency_key=f"{flow_run.get_id()}-{stage}",
    )
    child = cast(FlowRun, made)  # outside an event loop the call is not a coroutine
    if child.state and child.state.is_final():
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, Scheduled(), force=True)
    get_run_logger().info("%s runs apart, as %s of %s", stage, child.name, DEPLOYMENTS[stage])
    began = time.monotonic()
    try:
        child = _ended(child)
    except BaseException:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, Cancelling(message=CASCADE))
        _ended(child, END_SECONDS)
        raise
    last = child.state
    if last is None or not last.is_completed():
        outcome = Outcome.from_prefect_state(last.type.value) if last else Outcome.FAILED
        raise StageEndedError(outcome, f"{stage}: {last.message if last else 'lost'}")
    told = last.message or ""
    return StageResult(
        stage=stage,
        state="verified" if NOTHING_TO_DO in told else "done",
        seconds=round(time.monotonic() - began, 3),
        summary=told.split("; report: ")[0].removesuffix(f"; {NOTHING_TO_DO}"),
    )


def _ended(child: FlowRun, patience: float = float("inf")) -> FlowRun:
    began = last_sign = time.monotonic()
    while time.monotonic() - began < patience:
        time.sleep(POLL_SECONDS)
        try:
            with get_client(sync_client=True) as client:
                child = client.read_flow_run(child.id)
        except Exception as error:  # a server that is away is no reason to end
            get_run_logger().debug("the state of %s is not known: %s", child.name, error)
            continue
        if not (child.state and child.state.is_crashed()):
            last_sign = time.monotonic()
        if child.state and child.state.is_final() and not child.state.is_crashed():
            break
        if time.monotonic() - last_sign > RESUMED_SECONDS:
            break
    return child
