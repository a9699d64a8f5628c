"""Cancellation of a flow run: end its processes, and set a state message that says how to resume."""

import inspect
import os
import subprocess
import sys
import time
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled

from flows.parameters import config_of
from fm_core.checkpoint.catalog import newest_local_checkpoint
from fm_core.config import RunConfig
from fm_core.launch.upload_handover import describe_upload
from fm_core.run.directory import RunDirectory
from fm_core.run.status import read_status

SWEEP = "sweep"
"""Name of the flow that trains runs other than its own."""
FINAL_STATE_SECONDS = 120.0
"""Seconds to wait for the state Cancelled. A worker sets it within seconds of its hooks; the run's own
process may have set it before."""


def end_remaining_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """End a cancelled run's jobs; the `on_cancellation` hook of every flow.

    A worker calls it in a new process once it has ended the run's own process, which may not have had time to
    end its jobs. The worker then sets a final state with a generic message; another process (see
    `set_final_message`) replaces it with one that says how to resume.
    """
    from fm_core.launch.run_jobs import end_jobs

    config = effective_config(flow, flow_run.parameters or {})
    try:
        end_jobs(RunDirectory(config).path, sweeps=flow.name == SWEEP)
    finally:
        set_final_message(flow_run.id, resume_message(config, flow_run.id))


def effective_config(flow: Flow[..., Any], parameters: dict[str, Any]) -> RunConfig:
    """The configuration of a flow run, with the flow's defaults for absent parameters."""
    default: object = inspect.signature(flow.fn).parameters["config"].default
    own = default if isinstance(default, RunConfig) else None
    return config_of(flow.validate_parameters(parameters), own)


def resume_message(config: RunConfig, run_id: UUID | str) -> str:
    """One line with the point where the run stopped and the commands that resume it."""
    directory = RunDirectory(config)
    status = read_status(directory.path)
    resume = f"to resume: prefect flow-run retry {run_id}"
    if status is None:
        return f"stopped before the first stage; {resume}"
    where = f"stopped in stage {status['stage']}"
    if "step" in status:
        where = f"stopped at step {status['step']:,} ({status['images_seen']:,} images seen)"
        if last := newest_local_checkpoint(directory.checkpoints) or status.get("last_checkpoint"):
            where += f", checkpoint {last}"
        if uploaded := describe_upload(directory.path):
            where += f", {uploaded}"
    # Before the first training step there is no config.yaml.
    trained = status.get("step") or (directory.path / "config.yaml").exists()
    by_hand = f", or fm {status['stage']} --config {directory.path}/config.yaml" if trained else ""
    return f"{where}; {resume}{by_hand}"


def set_final_message(run_id: UUID, message: str) -> None:
    """Start a detached process that waits for the run's final state and replaces its message."""
    subprocess.Popen(
        [sys.executable, "-m", "flows.cancellation", str(run_id), message],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PREFECT_CLIENT_MAX_RETRIES": "1"},  # end soon if the server is unavailable
    )


def main(run_id: str, message: str) -> None:
    """Wait for the state Cancelled and, unless its message says how to resume, replace the message."""
    deadline = time.monotonic() + FINAL_STATE_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            try:
                state = client.read_flow_run(UUID(run_id)).state
                if state is None or not (state.is_cancelling() or state.is_cancelled()):
                    return  # restarted in the meantime
                if state.is_cancelled() and f"retry {run_id}" not in (state.message or ""):
                    client.set_flow_run_state(UUID(run_id), Cancelled(message=message), force=True)
                    return
            except httpx.HTTPError:  # the server is unavailable, temporarily or permanently
                time.sleep(1.0)
            time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
