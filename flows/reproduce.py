"""The paper's comparison as a flow."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.farewell import end_what_is_left
from flows.pipeline import pipeline, run_name
from flows.presets import CHECKERBOARD, Checkerboard


@flow(name="reproduce-paper", flow_run_name=run_name, on_cancellation=[end_what_is_left])
def reproduce_paper(config: Checkerboard = CHECKERBOARD) -> State[Any]:
    """Train, score and draw every objective of the paper's comparison, cell by cell.

    * **in**: nothing for the checkerboard in the plane: 17 minutes of one CPU core
    * **out**: `<run.root>/<run.name>/reproduce` with `report.html` and `results.json`
    * **again**: a run of the same `run.name` makes what is missing, and continues a cell that was cut short
    """
    return pipeline(config, ["reproduce"])
