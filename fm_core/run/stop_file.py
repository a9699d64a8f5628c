"""STOP files: requests to stop a run.

`STOP` in the control directory of a job or in its run directory is a request. Once the job has stopped,
`STOPPED` replaces it, so that the next start continues. A request that was made while no job ran ends the
next start, which removes it. A request in the run directory applies to all of its jobs; while training holds
the lease there, no other job removes it.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fm_core.errors import StopRequested, UserError
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import write_text

STOP, STOPPED = "STOP", "STOPPED"

logger = logging.getLogger("fm_core")


def request_stop(control: Path) -> bool:
    """Ask the job of a control directory to stop; False if the request cannot be written."""
    try:
        control.joinpath(STOP).touch()
    except OSError as error:
        logger.warning("cannot create %s (%s)", control / STOP, error.strerror)
        return False
    return True


def pending_request(*directories: Path) -> Path | None:
    """The first STOP file in these directories; a directory that cannot be read counts as having none."""
    for directory in directories:
        with suppress(OSError):
            directory.joinpath(STOP).stat()
            return directory / STOP
    return None


def was_stopped(control: Path) -> bool:
    """Whether a job of this control directory was asked to stop since it was submitted."""
    return pending_request(control) is not None or control.joinpath(STOPPED).exists()


def own_directories(control: Path, run: Path) -> tuple[Path, ...]:
    """The directories whose requests a job may remove; not its run directory while another job holds it."""
    if control == run:
        return (control,)
    try:
        held = Lease(run / "lock").holder() is not None
    except (OSError, UserError):  # cannot be read at the moment
        held = True
    return (control,) if held else (control, run)


def mark_stop_handled(*directories: Path) -> None:
    """Replace the requests in these directories by a STOPPED file in the first, the control directory."""
    with suppress(OSError):
        write_text(directories[0] / STOPPED, json.dumps({"schema": 1}) + "\n")
    for directory in directories:
        with suppress(OSError):
            directory.joinpath(STOP).unlink(missing_ok=True)


def refuse_pending_request(*directories: Path, handled_at: Mapping[Path, float] = {}) -> None:
    """Refuse to start if a stop was requested while no job was running; remove handled requests.

    Args:
        directories: the control directory of the new job, and its run directory; see `own_directories`.
        handled_at: for each of them, when the last job stopped on request, in seconds since 1970 by the clock
            of the file system; earlier requests are handled, even if their supervisor was killed.

    Raises:
        StopRequested: there is a request that no job has handled; it is removed.
    """
    for directory in directories:
        with suppress(OSError):
            stop = directory / STOP
            if stop.stat().st_mtime > handled_at.get(directory, 0.0):
                mark_stop_handled(*directories)
                raise StopRequested(
                    f"{stop} was created while nothing was running: this start ends and removes it; "
                    "run it again to continue"
                )
    for directory in directories:
        for name in (STOP, STOPPED):
            with suppress(OSError):
                directory.joinpath(name).unlink(missing_ok=True)
