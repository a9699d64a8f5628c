"""Each stage as a Prefect task: one bar in the graph of a run.

The tasks are called directly, never submitted: a cancelled run gets its signal in the main thread,
and that is where the stage must be to stop its processes.
"""

from typing import Any, cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Abort, TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.artifacts import create_artifacts
from flows.cancellation import how_to_continue
from flows.cancellation_watch import CancellationWatch
from flows.progress import ProgressReport, duration
from fm_core.commands import stage_function
from fm_core.config import RunConfig
from fm_core.errors import (
    Outcome,
    StageEndedError,
    StopRequested,
    UnrecoverableError,
    UserError,
    outcome_of,
)
from fm_core.launch.run_jobs import stop_requested
from fm_core.run.directory import RunDirectory
from fm_core.run.results import StageResult


def final_task_state(ended: StageEndedError) -> State[Any]:
    """The final state of the stage's task."""
    return State(type=StateType(ended.outcome.prefect_state), message=ended.message)


def final_flow_state(ended: StageEndedError) -> State[Any]:
    """The final state of the flow.

    Prefect's engine raises what a state that is not Completed holds, with a traceback in the run's log,
    unless it is the signal to end quietly.
    """
    state = StateType(ended.outcome.prefect_state)
    return State(type=state, message=ended.message, data=Abort(ended.message))


def ended_because_of(error: BaseException, config: RunConfig) -> StageEndedError:
    """How a stage ended: refused, stopped on request, or interrupted by an accident.

    Crashed is what starts a run again (infra/automations.yaml), so it is for accidents alone: a job that
    stopped although nobody asked for it, as when its launcher is killed.
    """
    if isinstance(error, UserError | UnrecoverableError):
        return StageEndedError(outcome_of(error), str(error))
    message = how_to_continue(config, flow_run.get_id() or "")
    if isinstance(error, StopRequested) and not stop_requested(RunDirectory(config).path):
        return StageEndedError(Outcome.ORPHANED, f"its processes were ended by nobody's request: {message}")
    return StageEndedError(Outcome.STOPPED, message)


def run_stage(name: str, config: RunConfig, watch: CancellationWatch) -> StageResult:
    """Run one stage under its bar; raises StageEndedError when it refused or was stopped."""
    bar = _stage.with_options(name=name, task_run_name=bar_name(name, config))
    last = bar(name, config, watch)
    if last.is_completed():
        return cast(StageResult, cast(Any, last.data).result)
    raise StageEndedError(Outcome.from_prefect_state(last.type.value), last.message or name)


@task(cache_policy=NO_CACHE, persist_result=False)
def _stage(name: str, config: RunConfig, watch: CancellationWatch) -> State[Any]:
    """One stage of the pipeline."""
    logger = get_run_logger()
    try:
        with ProgressReport(name, config) as progress:
            result = stage_function(name)(config, progress)
    except (UserError, UnrecoverableError, StopRequested) as error:
        # As a state and not as an exception: the line is for the user, a traceback would bury it.
        return final_task_state(ended_because_of(error, config))
    except TerminationSignal as signal:
        if watch.cancelled():
            return final_task_state(ended_because_of(signal, config))
        raise
    logger.info("%s in %s: %s", result.state, duration(result.seconds), result.summary)
    create_artifacts(config, result)
    # The stage has compared hashes and manifests; Prefect's own cache would not know what is on the disk.
    kept = "Cached" if result.state == "verified" else None
    return Completed(name=kept, message=result.summary, data=result)


def bar_name(name: str, config: RunConfig) -> str:
    """Name of the stage's bar; that of a stage with processes of its own tells how many."""
    if name not in ("train", "sample"):
        return name
    from fm_core.launch.dispatch import world

    return f"{name}[{world(config.launch)[0]}]"
