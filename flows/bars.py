"""Each stage as a Prefect task: one bar in the graph of a run.

The tasks are called directly, never submitted: a cancelled run gets its signal in the main thread,
and that is where the stage must be to stop its processes.
"""

from collections.abc import Callable
from typing import Any, cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Abort

from flows.exhibits import exhibit
from flows.progress import ProgressReport, duration
from fm_core.config import RunConfig
from fm_core.errors import Stopped, UserError
from fm_core.run.progress import Observer
from fm_core.stages.result import StageResult

Stage = Callable[[RunConfig, Observer], StageResult]


class Ended(Exception):
    """A run that ends without a result for a reason that is no fault of the program."""

    def __init__(self, type: StateType, message: str) -> None:
        super().__init__(message)
        self.type = type
        self.message = message

    def state(self) -> State[Any]:
        """The final state of the stage's task."""
        return State(type=self.type, message=self.message)

    def last_state(self) -> State[Any]:
        """The final state of the flow.

        Prefect's engine raises what a state that is not Completed holds, with a traceback in the
        run's log, unless it is the signal to end quietly.
        """
        return State(type=self.type, message=self.message, data=Abort(self.message))

    @classmethod
    def because_of(cls, error: UserError | Stopped) -> "Ended":
        """Failed for what the user must mend, Cancelled for what was stopped on request."""
        return cls(StateType.FAILED if isinstance(error, UserError) else StateType.CANCELLED, str(error))


def run_stage(name: str, config: RunConfig) -> StageResult:
    """Run one stage under its bar; raises Ended when it refused or was stopped."""
    bar = _stage.with_options(name=name, task_run_name=bar_name(name, config))
    outcome = bar(name, config)
    if isinstance(outcome, State):
        raise Ended(outcome.type, outcome.message or name)
    return outcome


@task(cache_policy=NO_CACHE, persist_result=False)
def _stage(name: str, config: RunConfig) -> StageResult | State[Any]:
    """One stage of the pipeline."""
    logger = get_run_logger()
    try:
        with ProgressReport(name) as progress:
            result = stage_called(name)(config, progress)
    except (UserError, Stopped) as error:
        # As a state and not as an exception: the line is for the user, a traceback would bury it.
        return Ended.because_of(error).state()
    logger.info("%s in %s: %s", result.state, duration(result.seconds), result.summary)
    exhibit(config, result)
    return result


def bar_name(name: str, config: RunConfig) -> str:
    """Name of the stage's bar; that of a stage with processes of its own tells how many."""
    if name not in ("train", "sample"):
        return name
    from fm_core.run.launch import world

    return f"{name}[{world(config.launch)[0]}]"


def stage_called(name: str) -> Stage:
    """The stage's function. Imported when it is run, so that a flow can be deployed without torch."""
    import importlib

    return cast(Stage, getattr(importlib.import_module(f"fm_core.stages.{name}"), name))
