"""Progress of a stage as a Prefect artifact and as a log line every half minute."""

import contextvars
import threading
import time
from types import TracebackType
from typing import Self, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.cancellation_watch import without_retries
from flows.checkpoint_events import CheckpointEvents
from flows.log_digest import LogDigest
from fm_core.config import RunConfig
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Progress, three_digits

PUBLISH_SECONDS = 4.0
"""Interval between two updates of the artifact."""
LOG_SECONDS = 30.0
"""Interval between two log lines; everything else is in the run directory's logs."""
STAGES_WITH_PROCESSES = ("train", "sample")
FLUSH_SECONDS = 10.0
"""How long the end of a stage waits for the last update to reach the server."""


class ProgressReport:
    """Observer that publishes the artifact `<stage>-progress` and the warnings of the stage's processes.

    One daemon thread talks to the server. The stage's own thread never waits for it; while the server is
    unreachable, only updates are lost.
    """

    def __init__(self, stage: str, config: RunConfig) -> None:
        self._stage = stage
        self._logs = RunDirectory(config).path / "logs"
        self._digest = LogDigest(self._logs, stage)
        self._checkpoint_events = CheckpointEvents(config) if stage == "train" else None
        self._logger = get_run_logger()
        self._latest = Progress(stage, 0, 0, "", "starting")
        self._ended = threading.Event()
        self._logged = time.monotonic()
        context = contextvars.copy_context()  # names the flow run and task run of the artifact
        publish = (without_retries, self._publish)
        self._thread = threading.Thread(target=context.run, args=publish, daemon=True)

    def __call__(self, progress: Progress) -> None:
        """Record the progress; log it if the last log line is old enough."""
        self._latest = progress
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            self._logger.info("%3.0f%%  %s", 100 * progress.fraction, describe(progress))

    def __enter__(self) -> Self:
        if self._stage in STAGES_WITH_PROCESSES:
            self._logger.info("full logs of its processes: %s/%s-*.log", self._logs, self._stage)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # A cancelled run has only seconds left; it does not wait for the artifact.
        self._thread.join(FLUSH_SECONDS if kind is None or issubclass(kind, Exception) else 0)

    def _publish(self) -> None:
        artifact = None
        published = None
        percent = 0.0
        last_round = False
        while not last_round:
            last_round = self._ended.is_set()
            latest = self._latest
            if latest is not published:
                percent = max(percent, percentage(latest))
                try:
                    if artifact is None:
                        created = create_progress_artifact(
                            percent, key=f"{self._stage}-progress", description=describe(latest)
                        )
                        artifact = cast(UUID, created)  # outside an event loop the call is not a coroutine
                    else:
                        update_progress_artifact(artifact, percent, description=describe(latest))
                    published = latest
                except Exception as error:
                    self._logger.debug("could not update %s-progress: %s", self._stage, error)
            self._log_new_entries(last_round)
            self._publish_checkpoint_events()
            self._ended.wait(PUBLISH_SECONDS)

    def _publish_checkpoint_events(self) -> None:
        try:
            if self._checkpoint_events:
                self._checkpoint_events.publish()
        except Exception as error:
            self._logger.debug("could not publish checkpoint events: %s", error)

    def _log_new_entries(self, last_round: bool) -> None:
        for level, text in self._digest.new_entries():
            self._logger.log(level, "%s", text)
        if last_round and self._digest.omitted:
            self._logger.warning("%d more warnings are only in the log files", self._digest.omitted)


def percentage(progress: Progress) -> float:
    """Progress in percent, 0 to 100; 0 while the total is not known."""
    return 100 * progress.fraction if progress.total else 0.0


def describe(progress: Progress) -> str:
    """A line such as "step 120, loss 0.31, 64,000 of 128,000 images, 812 images/s, ETA 1 min 19 s"."""
    parts = [progress.message] if progress.message else []
    if progress.total:
        parts.append(f"{progress.done:,} of {progress.total:,} {progress.unit}")
    if progress.rate:
        parts.append(f"{three_digits(progress.rate)} {progress.unit}/s")
    if progress.eta:
        parts.append(f"ETA {duration(progress.eta)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A duration with two units at most, e.g. "4 h 10 min"."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 48 * 3600:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"
