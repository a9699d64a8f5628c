"""The status of a run in one line, for `fm status`."""

import time
from dataclasses import replace
from pathlib import Path

from fm_core.config import RunConfig
from fm_core.launch.run_liveness import death_notice
from fm_core.launch.upload_handover import describe_upload
from fm_core.output import print_line
from fm_core.run.directory import RunDirectory
from fm_core.run.status import progress_of, read_status
from fm_core.terminal import describe

FOLLOW_SECONDS = 3.0


def show_status(config: RunConfig, follow: bool) -> int:
    """Print the status of a run; with `follow`, whenever it changes, until interrupted."""
    directory = RunDirectory(config).path
    printed = ""
    while True:
        line = _status_line(directory)
        if line != printed and not print_line(line) and follow:
            return 0  # the reader has exited
        printed = line
        if not follow:
            return 0
        time.sleep(FOLLOW_SECONDS)


def _status_line(directory: Path) -> str:
    status = read_status(directory)
    if status is None:
        return f"{directory}: no stage was run yet"
    stage, progress = status["stage"], progress_of(status)
    if notice := death_notice(directory, status):
        where = describe(replace(progress, rate=None))
        parts = [f"{stage} {notice}, at {where}"]
        # Before the first training step the run has no config.yaml to continue from.
        files = [directory / "config.yaml", directory / "logs" / f"{stage}.yaml"]
        files.sort(key=lambda file: stage == "sweep" and file.name == "config.yaml")  # it may have no axes
        if file := next((file for file in files if file.exists()), None):
            parts.append(f"to continue: fm {stage} --config {file}")
    else:
        parts = [f"{stage} {status['phase']}: {describe(progress)}"]
    if status["stage"] == "train" and (uploaded := describe_upload(directory)):
        parts.append(uploaded)
    return "; ".join(parts)
