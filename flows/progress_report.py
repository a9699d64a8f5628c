"""Progress of a stage as a Prefect artifact and as a log line every half minute."""

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import ObjectNotFound

from flows.cancellation_watch import without_retries
from flows.checkpoint_events import CheckpointEvents
from flows.last_updates import LAST_UPDATE_SECONDS, last_updates, server_away
from flows.log_digest import LogDigest
from fm_core.config import RunConfig
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Progress, duration, three_digits

PUBLISH_SECONDS = 4.0
"""Interval between two updates of the artifact."""
LOG_SECONDS = 30.0
"""Interval between two log lines; everything else is in the run directory's logs."""
STAGES_WITH_PROCESSES = ("train", "sample")
FLUSH_SECONDS = 10.0
"""Seconds that the next stage waits for the last update of this one to reach the server."""


class ProgressReport:
    """Observer that publishes the artifact `<stage>-progress` and the warnings of the stage's processes.

    A daemon thread communicates with the server, and no error ends it. The stage's own thread does not wait
    for it before the stage has ended. The last update is repeated until the server has it (last_updates.py).
    """

    def __init__(self, stage: str, config: RunConfig) -> None:
        self._stage = stage
        self._logs = RunDirectory(config).path / "logs"
        self._digest = LogDigest(self._logs, stage)
        self._checkpoint_events = CheckpointEvents(config) if stage == "train" else None
        self._logger = get_run_logger()
        self._warnings = _ForwardedWarnings(self._logger)
        self._artifact: UUID | None = None
        self._percent = 0.0
        self._latest = Progress(stage, 0, 0, "", "starting")
        self._published: Progress | None = None
        self._ended = threading.Event()
        self._deadline = float("inf")
        self._logged = time.monotonic()
        context = contextvars.copy_context()  # identifies the flow run and task run of the artifact
        publish = (without_retries, self._publish)
        self._thread = threading.Thread(target=context.run, args=publish, daemon=True)

    def __call__(self, progress: Progress) -> None:
        """Record the progress; log it if the last log line is old enough."""
        self._latest = progress
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            line = f"{100 * progress.fraction:3.0f}%  {describe(progress)}"
            self._survive(lambda: self._logger.info("%s", line))

    def __enter__(self) -> Self:
        if self._stage in STAGES_WITH_PROCESSES:
            where = f"{self._logs}/{self._stage}-*.log"
            self._survive(lambda: self._logger.info("full logs of its processes: %s", where))
        logging.getLogger("fm_core").addHandler(self._warnings)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("fm_core").removeHandler(self._warnings)
        if kind is None:  # the thread's last log line may be older than the end of the stage
            self._latest = finished(self._latest)
        # A cancelled run has only seconds left, so it does not wait for the artifact.
        cancelled = kind is not None and not issubclass(kind, Exception)
        self._deadline = time.monotonic() + (0.0 if cancelled else LAST_UPDATE_SECONDS)
        self._ended.set()
        if not cancelled:
            last_updates.wait_for(self._thread, self._deadline)
            self._thread.join(FLUSH_SECONDS)

    def _publish(self) -> None:
        while True:
            ending = self._ended.is_set()
            self._survive(self._log_new_entries)
            self._survive(self._publish_checkpoint_events)
            error = self._survive(self._update_bar)
            if ending and (error is None or not server_away(error) or time.monotonic() > self._deadline):
                break
            # After the end of the stage, only the server remains to be waited for.
            time.sleep(PUBLISH_SECONDS) if ending else self._ended.wait(PUBLISH_SECONDS)
        if self._digest.omitted:
            omitted = self._digest.omitted
            self._survive(lambda: self._logger.warning("%d more warnings are only in the log files", omitted))

    def _survive(self, part: Callable[[], None]) -> BaseException | None:
        """Call `work` and return its error, which must not end the thread."""
        try:
            part()
        # Prefect's console handler raises SystemExit if its terminal or pipe is closed.
        except (Exception, SystemExit) as error:
            with suppress(Exception, SystemExit):
                self._logger.debug("%s: could not publish everything: %s", self._stage, error)
            return error
        return None

    def _update_bar(self) -> None:
        latest = self._latest
        if latest is self._published:
            return
        self._percent = max(self._percent, percentage(latest))
        if self._artifact is None:
            created = create_progress_artifact(
                self._percent, key=f"{self._stage}-progress", description=describe(latest)
            )
            self._artifact = cast(UUID, created)  # outside an event loop the call is not a coroutine
        else:
            try:
                update_progress_artifact(self._artifact, self._percent, description=describe(latest))
            except ObjectNotFound:  # the artifact was deleted, or the database was replaced
                self._artifact = None
                self._update_bar()
        self._published = latest

    def _publish_checkpoint_events(self) -> None:
        if self._checkpoint_events:
            self._checkpoint_events.publish()

    def _log_new_entries(self) -> None:
        for level, text in self._digest.new_entries():
            self._logger.log(level, "%s", text)


class _ForwardedWarnings(logging.Handler):
    """Forwards the package's warnings, e.g. about an unresponsive scheduler, to the log of the flow run."""

    def __init__(self, logger: "logging.Logger | logging.LoggerAdapter[logging.Logger]") -> None:
        super().__init__(logging.WARNING)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Log the record's message."""
        self._logger.log(record.levelno, "%s", record.getMessage())


def finished(latest: Progress) -> Progress:
    """The final progress of a successful stage, from its last report."""
    total = latest.total or 1
    return replace(latest, done=total, total=total, unit=latest.unit or "stage", rate=None)


def percentage(progress: Progress) -> float:
    """Progress in percent, 0 to 100; 0 while the total is not known."""
    return 100 * progress.fraction if progress.total else 0.0


def describe(progress: Progress) -> str:
    """Format as e.g. "step 120, loss 0.31, 64,000 of 128,000 images, 812 images/s, ETA 1 min 19 s"."""
    parts = [progress.message] if progress.message else []
    if progress.total:
        parts.append(f"{progress.done:,} of {progress.total:,} {progress.unit}")
    if progress.rate:
        parts.append(f"{three_digits(progress.rate)} {progress.unit}/s")
    if progress.eta:
        parts.append(f"ETA {duration(progress.eta)}")
    return ", ".join(parts)
