"""A stage's progress as a Prefect artifact and as an occasional log line."""

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
"""The artifact is brought up to date this often."""
LOG_SECONDS = 30.0
"""A log line is written this often; everything else is in the run directory's logs."""
STAGES_WITH_PROCESSES = ("train", "sample")
FAREWELL_SECONDS = 10.0
"""How long the end of a stage waits for its last update to reach the server."""


class ProgressReport:
    """An observer that shows the bar `<stage>-progress` and the warnings of the stage's processes.

    One daemon thread talks to the server. The stage's own thread never waits for it, and a server
    that is away costs nothing but updates.
    """

    def __init__(self, stage: str, config: RunConfig) -> None:
        self._stage = stage
        self._logs = RunDirectory(config).path / "logs"
        self._bulletin = LogDigest(self._logs, stage)
        self._milestones = CheckpointEvents(config) if stage == "train" else None
        self._logger = get_run_logger()
        self._latest = Progress(stage, 0, 0, "", "starting")
        self._ended = threading.Event()
        self._logged = time.monotonic()
        context = contextvars.copy_context()  # names the flow run and task run of the artifact
        publish = (without_retries, self._publish)
        self._thread = threading.Thread(target=context.run, args=publish, daemon=True)

    def __call__(self, progress: Progress) -> None:
        """Take note of how far the stage is."""
        self._latest = progress
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            self._logger.info("%3.0f%%  %s", 100 * progress.fraction, describe(progress))

    def __enter__(self) -> Self:
        if self._stage in STAGES_WITH_PROCESSES:
            self._logger.info("all that its processes say: %s/%s-*.log", self._logs, self._stage)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # A cancelled run has seconds to live; the artifact is not worth one of them.
        self._thread.join(FAREWELL_SECONDS if kind is None or issubclass(kind, Exception) else 0)

    def _publish(self) -> None:
        artifact = None
        shown = None
        percent = 0.0
        last_round = False
        while not last_round:
            last_round = self._ended.is_set()
            latest = self._latest
            if latest is not shown:
                percent = max(percent, percentage(latest))
                try:
                    if artifact is None:
                        created = create_progress_artifact(
                            percent, key=f"{self._stage}-progress", description=describe(latest)
                        )
                        artifact = cast(UUID, created)  # outside an event loop the call is not a coroutine
                    else:
                        update_progress_artifact(artifact, percent, description=describe(latest))
                    shown = latest
                except Exception as error:
                    self._logger.debug("%s-progress was not updated: %s", self._stage, error)
            self._warn(last_round)
            self._show_milestones()
            self._ended.wait(PUBLISH_SECONDS)

    def _show_milestones(self) -> None:
        try:
            if self._milestones:
                self._milestones.show()
        except Exception as error:
            self._logger.debug("the milestones are not shown: %s", error)

    def _warn(self, last_round: bool) -> None:
        for level, text in self._bulletin.news():
            self._logger.log(level, "%s", text)
        if last_round and self._bulletin.left_out:
            self._logger.warning("%d more warnings are in the logs alone", self._bulletin.left_out)


def percentage(progress: Progress) -> float:
    """0 to 100; 0 while nothing is known."""
    return 100 * progress.fraction if progress.total else 0.0


def describe(progress: Progress) -> str:
    """One line, e.g. "step 120, loss 0.31, 64,000 of 128,000 images, 812 images/s, ETA 1 min 19 s"."""
    parts = [progress.message] if progress.message else []
    if progress.total:
        parts.append(f"{progress.done:,} of {progress.total:,} {progress.unit}")
    if progress.rate:
        parts.append(f"{three_digits(progress.rate)} {progress.unit}/s")
    if progress.eta:
        parts.append(f"ETA {duration(progress.eta)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Two units at most, e.g. "4 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
