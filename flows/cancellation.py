"""What a cancelled run leaves behind: no process, and a state that tells how to go on."""

import inspect
import os
import subprocess
import sys
import time
from typing import Any
from uuid import UUID

from prefect import Flow, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled

from fm_core.config import RunConfig
from fm_core.launch.upload_handover import describe_upload
from fm_core.run.directory import RunDirectory
from fm_core.run.status import read_status
from fm_core.storage.local_paths import local_path

PATIENCE_SECONDS = 30.0
"""A worker sets the state within seconds of its hooks; the run's own process may have set it before."""


def end_remaining_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook for on_cancellation: a worker calls it in a new process when it has ended the run's own.

    Jobs that the run's process had no time to end are ended now. The worker's last state carries a
    message of its own; another process replaces it by one that tells how to go on.
    """
    from fm_core.launch.run_jobs import end_jobs

    config = configuration(flow, flow_run.parameters or {})
    end_jobs(RunDirectory(config).path)
    set_final_message(flow_run.id, how_to_continue(config, flow_run.id))


def configuration(flow: Flow[..., Any], parameters: dict[str, Any]) -> RunConfig:
    """What a flow run was asked for, the flow's own defaults included."""
    given = flow.validate_parameters(parameters)
    return given.get("config") or inspect.signature(flow.fn).parameters["config"].default


def how_to_continue(config: RunConfig, run_id: UUID | str) -> str:
    """Where the run stopped and the commands that continue it, in one line."""
    directory = RunDirectory(config)
    status = read_status(directory.path)
    again = f"to go on: prefect flow-run retry {run_id}"
    if status is None:
        return f"stopped before the first stage; {again}"
    where = f"stopped in stage {status['stage']}"
    if "step" in status:
        where = f"stopped at step {status['step']:,} ({status['images_seen']:,} images seen)"
        if last := newest_checkpoint(directory) or status.get("last_checkpoint"):
            where += f", checkpoint {last}"
        if uploaded := describe_upload(directory.path):
            where += f", {uploaded}"
    return f"{where}; {again}, or fm {status['stage']} --config {directory.path}/config.yaml"


def newest_checkpoint(directory: RunDirectory) -> str | None:
    """Name of the newest complete checkpoint, where checkpoints lie on this file system."""
    folder = local_path(directory.checkpoints)
    marks = folder.glob("step-*/COMPLETE") if folder else ()
    return max((mark.parent.name for mark in marks), default=None)


def set_final_message(run_id: UUID, message: str) -> None:
    """Have a process of its own wait for the run's last state and put the message into it."""
    subprocess.Popen(
        [sys.executable, "-m", "flows.cancellation", str(run_id), message],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PREFECT_CLIENT_MAX_RETRIES": "1"},  # it must not outlive its server for long
    )


def main(run_id: str, message: str) -> None:
    """Wait for a state Cancelled that does not say how to go on, and say it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            state = client.read_flow_run(UUID(run_id)).state
            if state is None or not (state.is_cancelling() or state.is_cancelled()):
                return  # it was started again meanwhile
            if state.is_cancelled() and f"retry {run_id}" not in (state.message or ""):
                client.set_flow_run_state(UUID(run_id), Cancelled(message=message), force=True)
                return
            time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
