"""Stages as Prefect tasks, each a bar in the graph of a flow run.

The tasks are called directly, never submitted, because a cancelled run gets its signal in the main thread,
where the stage has to run to be able to stop its processes.
"""

from collections.abc import Mapping
from typing import Any, cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Abort, TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.artifacts import create_artifacts
from flows.cancellation import SWEEP, resume_message
from flows.cancellation_watch import CancellationWatch
from flows.progress_report import ProgressReport
from fm_core.commands import stage_function
from fm_core.config import RunConfig
from fm_core.errors import (
    DetachedError,
    LeaseLostError,
    Outcome,
    StageEndedError,
    StopRequested,
    UnrecoverableError,
    UserError,
    outcome_of,
)
from fm_core.launch.run_jobs import stop_requested
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import duration
from fm_core.run.results import StageResult


def final_task_state(ended: StageEndedError) -> State[Any]:
    """The final state of the stage's task."""
    return State(type=StateType(ended.outcome.prefect_state), message=ended.message)


def final_flow_state(ended: StageEndedError) -> State[Any]:
    """The final state of the flow.

    Prefect's engine raises the data of a state that is not Completed, with a traceback in the run's log. An
    Abort is the exception: the flow run ends without a traceback.
    """
    state = StateType(ended.outcome.prefect_state)
    return State(type=state, message=ended.message, data=Abort(ended.message))


def as_stage_ended(error: BaseException, config: RunConfig, cancelled: bool = True) -> StageEndedError:
    """Convert an exception to the outcome and the message of the stage: failed, stopped, or orphaned.

    A flow run in the state Crashed is started again (infra/automations.yaml), so Outcome.ORPHANED is used for
    a job that stopped without a request, e.g. because its launcher was killed, and for a signal to this
    process that is not a cancellation of its run, e.g. because its worker or host is shut down.
    """
    if isinstance(error, StageEndedError):
        return error
    if isinstance(error, UserError | UnrecoverableError | LeaseLostError | DetachedError):
        return StageEndedError(outcome_of(error), str(error))
    message = resume_message(config, flow_run.get_id() or "")
    own = RunDirectory(config).path
    if isinstance(error, StopRequested) and not stop_requested(own, flow_run.get_flow_name() == SWEEP):
        return StageEndedError(Outcome.ORPHANED, f"its processes ended without a stop request: {message}")
    if isinstance(error, TerminationSignal) and not cancelled:
        return StageEndedError(Outcome.ORPHANED, f"its worker or its host was shut down: {message}")
    return StageEndedError(Outcome.STOPPED, message)


def run_stage(
    name: str, config: RunConfig, watch: CancellationWatch, options: Mapping[str, Any] = {}, of: str = ""
) -> StageResult:
    """Run one stage as a task. Raises StageEndedError if it was refused, was stopped, or cannot continue.

    `options` are further arguments of its function. `of` is added to the name of the task if the flow run has
    the same stage of another run.
    """
    title = f"{name} of {of}" if of else name
    stage_task = _stage.with_options(name=title, task_run_name=task_name(name, config, of))
    final = stage_task(name, config, watch, options)
    if final.is_completed():
        return cast(StageResult, cast(Any, final.data).result)
    raise StageEndedError(Outcome.from_prefect_state(final.type.value), final.message or name)


@task(cache_policy=NO_CACHE, persist_result=False, retries=0)
def _stage(name: str, config: RunConfig, watch: CancellationWatch, options: Mapping[str, Any]) -> State[Any]:
    """One stage of the pipeline."""
    logger = get_run_logger()
    try:
        with ProgressReport(name, config) as progress:
            result = stage_function(name)(config, progress, **options)
    except (
        *(UserError, UnrecoverableError, LeaseLostError, DetachedError),
        *(StopRequested, StageEndedError, TerminationSignal),
    ) as error:
        # Returned as a state, not raised, because a traceback would bury the message for the user.
        cancelled = isinstance(error, TerminationSignal) and watch.cancelled()
        return final_task_state(as_stage_ended(error, config, cancelled))
    logger.info("%s in %s: %s", result.state, duration(result.seconds), result.summary)
    create_artifacts(config, result)
    # The stage verifies hashes and manifests itself; Prefect's cache does not know what is on the disk.
    state_name = "Cached" if result.state == "verified" else None
    return Completed(name=state_name, message=result.summary, data=result)


def task_name(name: str, config: RunConfig, of: str = "") -> str:
    """Name of the stage's task run, with the number of processes if it launches a job, e.g. "train[2]"."""
    title = f"{name} of {of}" if of else name
    if name not in ("train", "sample"):
        return title
    from fm_core.launch.dispatch import world

    return f"{title}[{world(config.launch)[0]}]"
