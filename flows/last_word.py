"""Puts a message into the last state of a cancelled flow run: `python -m flows.last_word RUN_ID MESSAGE`.

Prefect's worker sets that state itself, with words of its own, when all hooks have returned. So this waits
until it has.
"""

import sys
import time
from uuid import UUID

from prefect import get_client
from prefect.states import Cancelled

PATIENCE_SECONDS = 30.0
"""A worker sets the state within seconds of its hooks; the run's own process may have set it before."""


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
