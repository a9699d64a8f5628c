"""Body of every flow: check the configuration, run the stages, report the result as a final state."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.logging import get_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.cancellation_watch import CancellationWatch
from flows.last_updates import last_updates
from flows.parameters import config_of
from flows.stage_tasks import as_stage_ended, final_flow_state, run_stage
from flows.subflows import NOTHING_TO_DO, check_slots, run_subflow
from fm_core.commands import preflight, resolve
from fm_core.config import RunConfig
from fm_core.config.derived_defaults import dataset_name
from fm_core.errors import DetachedError, Outcome, StageEndedError, StopRequested, UserError
from fm_core.run.results import StageResult

ALL_STAGES = ("shard", "train", "sample", "evaluate", "report")


def pipeline(
    config: RunConfig,
    stages: Sequence[str],
    apart: Collection[str] = (),
    before: Callable[[RunConfig], None] | None = None,
    needs_slots: Collection[str] = (),
    options: Mapping[str, Any] = {},
) -> State[Any]:
    """Run stages in sequence and return the flow's final state, whose message contains the result.

    Stages named in `apart` run as flow runs of their own deployments. `before` is called once the preflight
    checks have passed, before the first stage. The stages themselves, called with `options`, may create flow
    runs of the deployments named in `needs_slots`.
    """

    def run(watch: CancellationWatch) -> list[StageResult]:
        preflight(config, [stage for stage in stages if stage not in apart])
        check_slots([*apart, *needs_slots])
        if before:
            before(config)
        return run_stages(config, stages, apart, watch, options)

    return final_state_of(config, run)


def run_stages(
    config: RunConfig,
    stages: Sequence[str],
    apart: Collection[str],
    watch: CancellationWatch,
    options: Mapping[str, Any] = {},
) -> list[StageResult]:
    """Run stages in sequence; raises the exceptions of `run_stage` and `run_subflow`."""
    return [
        run_subflow(stage, resolve(config)) if stage in apart else run_stage(stage, config, watch, options)
        for stage in stages
    ]


def final_state_of(config: RunConfig, run: Callable[[CancellationWatch], list[StageResult]]) -> State[Any]:
    """The flow's final state: that of the results of `run`, or of the exception that ended it.

    `config` is that of the run which the flow run belongs to.
    """
    _tag(config)
    with CancellationWatch() as watch:
        try:
            results = run(watch)
            last_updates.wait()
            return Completed(message=result_message(results))
        except (StageEndedError, UserError, StopRequested, DetachedError, TerminationSignal) as error:
            cancelled = isinstance(error, TerminationSignal) and watch.cancelled()
            ended = as_stage_ended(error, config, cancelled)
            if ended.outcome is Outcome.REFUSED:
                last_updates.wait()
            return final_flow_state(ended)


def result_message(results: Sequence[StageResult]) -> str:
    """One line with the scores, or else the last stage's summary, and the path of the report."""
    by_stage = {result.stage: result for result in results}
    last = results[-1]
    line = by_stage.get("evaluate", last).summary
    if all(result.state == "verified" for result in results):
        line += f"; {NOTHING_TO_DO}"
    report = last.paths.get("report")
    return f"{line}; report: {report}" if report else line


def run_name() -> str:
    """Name of a flow run: data set, run and seed, e.g. "digits-s0"; "refused" for an invalid file or key."""
    try:
        config = config_of(flow_run.get_parameters())
    except UserError:
        return "refused"  # the flow run itself fails with the message
    name, data = config.run.name, _data_name(config)
    return f"{name if name.startswith(data) else f'{data}-{name}'}-s{config.run.seed}"


def _data_name(config: RunConfig) -> str:
    """Name of the data set; if absent, the one that the stages derive from its URL."""
    data = config.data
    return data.name if data.given("name") or not data.source.url else dataset_name(data)


def _tag(config: RunConfig) -> None:
    """Tag the flow run with its run and data set. A failure is logged and ignored."""
    try:
        with get_client(sync_client=True) as client:
            tags = {*flow_run.get_tags(), f"run:{config.run.name}", f"data:{_data_name(config)}"}
            client.update_flow_run(UUID(flow_run.get_id()), tags=sorted(tags))
    except Exception as error:
        get_logger(__name__).debug("could not tag the flow run: %s", error)
