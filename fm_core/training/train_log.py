"""Log files of a training run: metrics.jsonl, held_out.jsonl and status.json.

A failed write does not stop training: it is reported once, and the lines are kept in memory and written
later. A checkpoint becomes valid only after the lines that it covers are on the disk. Lines are never
deleted: those of steps that are trained again are moved to another file first.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import UserError
from fm_core.run.fence import Fence, Unfenced
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import append_line, ends_with_line, flush, sync, write_bytes
from fm_core.training.metrics import finite

LOG = logging.getLogger(__name__)
STATUS_SECONDS = 3.0
"""Minimum interval between writes of status.json, so that a slow file server does not slow down training."""


class TrainLog:
    """Writes metrics.jsonl, held_out.jsonl and status.json, on rank 0; `export` gets each line as well."""

    def __init__(
        self,
        directory: Path,
        metrics: Path,
        job: str,
        images: int,
        export: Callable[[Mapping[str, Any]], None] = lambda record: None,
        landmark: Path | None = None,
        fence: Fence | None = None,
    ) -> None:
        """`landmark`: a file of the run directory; if it is missing, the directory is not mounted."""
        self.fence = fence or Unfenced()
        self._fenced_at: tuple[float, float] | None = None
        self.directory, self.metrics, self.job, self.images = directory, metrics, job, images
        self.export, self.landmark = export, landmark
        self.validation = metrics.with_name("held_out.jsonl")
        self.facts: dict[str, Any] = {"job": job}
        self._status_at = float("-inf")
        self._waiting: list[tuple[Path, dict[str, Any]]] = []
        """Lines that could not be written yet, in order."""
        self._unsure = False
        """Whether a failed attempt may already have written the first of them."""
        self._reported: set[str] = set()

    def forget_after(self, step: int) -> None:
        """Set aside the lines of steps that a resumed run will train again.

        Raises OSError, also if the run directory is not mounted, since its lines would be duplicated later.
        """
        self._check_mounted()
        self._waiting = [(path, record) for path, record in self._waiting if record["step"] <= step]
        for path in (self.metrics, self.validation):
            set_lines_aside(path, step)
        self._check_mounted()

    def line(self, record: dict[str, Any]) -> None:
        """Append one metrics line."""
        line = {key: finite(value) for key, value in record.items()}
        self._append(self.metrics, line)
        self.export(line)
        self.facts |= {key: finite(record[key]) for key in ("loss", "lr", "images_per_s")}

    def validation_line(self, record: dict[str, Any]) -> None:
        """Append one measurement of the validation loss."""
        self._append(self.validation, record)
        if record["loss"] is not None:
            self.facts["held_out_loss"] = record["loss"]
            self.export({**record, "loss": None, "held_out_loss": record["loss"]})

    def sync(self) -> None:
        """Sync every line to the disk. Raises OSError if that fails; the next call tries again."""
        self._write_waiting()
        for path in (self.metrics, self.validation):
            if path.exists():
                sync(path)
        if self.metrics.parent.exists():
            sync(self.metrics.parent)

    def status(self, state: TrainState, phase: str = "running", now: bool = False) -> None:
        """Rewrite status.json, at most once every few seconds unless `now`; never raises."""
        seconds = time.monotonic()
        if not now and seconds - self._status_at < STATUS_SECONDS:
            return
        self._status_at = seconds
        loss = self.facts.get("loss")
        message = f"step {state.step:,}" + (f", loss {loss:.4f}" if loss is not None else "")
        if "checkpoint_problem" in self.facts:
            message += ", the last checkpoint could not be written"
        rate = self.facts.get("images_per_s")
        progress = Progress(
            "train", min(state.images_seen, self.images), self.images, "images", message, rate
        )
        facts = {
            "step": state.step,
            "images_seen": state.images_seen,
            "position": state.position,
            **self.facts,
        }
        self._attempt("status.json", lambda: self._write_status(progress, phase, facts))
        if self._waiting:
            self._attempt("metrics", self._write_waiting)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        self._waiting.append((path, record))
        self._attempt("metrics", self._write_waiting)

    def _write_waiting(self) -> None:
        self._check_mounted()
        while self._waiting:
            path, record = self._waiting[0]
            # An error of close, e.g. of a file server, is raised after the line was written.
            if not (self._unsure and ends_with_line(path, record)):
                self._unsure = True
                append_line(path, record)
            self._unsure = False
            self._waiting.pop(0)

    def _write_status(self, progress: Progress, phase: str, facts: dict[str, Any]) -> None:
        self._check_mounted()
        write_status(self.directory, progress, phase, **facts)

    def _check_mounted(self) -> None:
        """Raise OSError if the run directory is not mounted, because files written there would be lost.

        Raises LeaseLostError if it now belongs to another job. The wall clock is used as well, because the
        monotonic clock may not advance while a machine is paused.
        """
        now = (time.monotonic(), time.time())
        last = self._fenced_at
        if last is None or any(abs(a - b) >= STATUS_SECONDS for a, b in zip(now, last, strict=True)):
            self.fence.check()
            self._fenced_at = now
        if self.landmark and not self.landmark.exists():
            raise FileNotFoundError(f"{self.landmark} is missing; check that the run directory is mounted")

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, UserError) as error:
            if what not in self._reported:
                LOG.warning("cannot write %s: %s; retrying, training continues", what, error)
            self._reported.add(what)
        else:
            self._reported.discard(what)


def set_lines_aside(path: Path, step: int) -> None:
    """Durably move the lines of steps after `step` to <name>.set-aside.jsonl in the same directory.

    A line truncated by a crash is moved as well. Raises OSError.
    """
    try:
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return
    earlier = [line for line in lines if _step(line) <= step]
    later = b"".join(line + b"\n" for line in lines if _step(line) > step)
    if not later:
        return
    aside = path.with_name(f"{path.stem}.set-aside{path.suffix}")
    # After a crash between the two writes they are already in that file.
    if not (aside.exists() and aside.read_bytes().endswith(later)):
        with aside.open("ab") as file:
            file.write(later)
            flush(file)
    sync(path.parent)
    write_bytes(path, b"".join(line + b"\n" for line in earlier))
    sync(path.parent)


def _step(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
