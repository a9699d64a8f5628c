"""Flows of a sweep: the sweep itself, and one of its points as a flow run of its own deployment."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.runtime import flow_run

from flows.artifacts import slug
from flows.cancellation import effective_config, end_remaining_jobs, resume_message, set_final_message
from flows.parameters import config_of
from flows.pipeline import pipeline, run_name
from flows.stage_tasks import final_flow_state
from flows.subflows import outcome_of_run, run_subflows
from fm_core.errors import Outcome, StageEndedError, UserError, outcome_of
from fm_core.storage.hashing import fingerprint

if TYPE_CHECKING:
    from fm_core.sweep.sweep_points import SweepPoint

POINT = "sweep-point"


@flow(name="sweep", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def sweep(
    config_file: str | None = None, config: dict[str, Any] | None = None, apart: bool = False
) -> State[Any]:
    """Sample and score every combination of the values of `sweep.axes`, and find the best one.

    * **output**: normal samples and scores of every point; `<run.root>/<run.name>/sweep` with `sweep.html`,
      `sweep.png` and `results.json`
    * **rerun**: a run with the same configuration verifies the points that are complete and continues

    Args:
        config_file: a configuration file, a path on the worker's machine relative to the project's root, e.g.
            the `config.yaml` of a run
        config: a tree of configuration keys: alone, or to replace values of the file, e.g.
            `{"sweep": {"axes": {"sample.guidance": [1, 1.5, 2]}}}`
        apart: run every point as a flow run of the deployment `sweep-point`, in its work pool
    """
    try:
        given = config_of({"config_file": config_file, "config": config})
    except UserError as error:
        return final_flow_state(StageEndedError(outcome_of(error), str(error)))
    options = {"elsewhere": run_points} if apart else {}
    return pipeline(given, ["sweep"], needs_slots=[POINT] if apart else [], options=options)


def point_name() -> str:
    """Name of the flow run of a point: data set, run, seed and values."""
    return f"{run_name()}-{slug(str(flow_run.get_parameters().get('point', '')))}".rstrip("-")


def end_jobs_of_point(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """End the jobs of a cancelled point if the run is its own; other points may sample from the same run."""
    parameters = flow_run.parameters or {}
    if "train" in parameters.get("stages", ()):
        end_remaining_jobs(flow, flow_run, state)
        return
    config = effective_config(flow, parameters)
    set_final_message(UUID(str(flow_run.id)), resume_message(config, flow_run.id))


@flow(name=POINT, flow_run_name=point_name, retries=0, on_cancellation=[end_jobs_of_point])
def sweep_point(
    config: dict[str, Any],
    point: str = "",
    stages: tuple[Literal["train", "sample", "evaluate"], ...] = ("sample", "evaluate"),
) -> State[Any]:
    """Train, sample and score one point of a sweep. The flow `sweep` creates its runs.

    Args:
        config: the complete configuration of the point
        point: its values, for the name of the flow run
        stages: the stages to run, in order
    """
    try:
        given = config_of({"config": config})
    except UserError as error:
        return final_flow_state(StageEndedError(outcome_of(error), str(error)))
    return pipeline(given, stages)


def run_points(points: "Sequence[SweepPoint]", report: Callable[[int, str], None]) -> dict[str, str]:
    """Run points as flow runs of their deployment; return the messages of those that failed, by title.

    Raises StageEndedError if one was cancelled or has crashed; it can be continued.
    """
    parameters = {
        point.title: {
            "config": point.config.model_dump(mode="json"),
            "point": point.title,
            "stages": list(point.stages),
        }
        for point in points
    }
    # A later attempt with other parameters, e.g. the step of a newer checkpoint, must not reuse these runs.
    named = {f"{title}-{fingerprint(values)[:8]}": values for title, values in parameters.items()}
    children = run_subflows(
        POINT, named, lambda ended: report(ended, f"{ended} of {len(points)} flow runs ended")
    )
    outcomes = {point.title: outcome_of_run(child) for point, child in zip(points, children, strict=True)}
    for title, (outcome, message) in outcomes.items():
        if outcome in (Outcome.STOPPED, Outcome.ORPHANED):
            raise StageEndedError(outcome, f"{title}: {message}")
    return {title: message for title, (outcome, message) in outcomes.items() if outcome is not Outcome.DONE}
