"""Training metrics: sums over a logging interval, metrics.jsonl, held_out.jsonl and status.json."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_core.checkpoint.train_state import TrainState
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import append_line, read_lines, write_text
from fm_core.training.mfu import memory_bytes

QUARTERS = 4
STATUS_SECONDS = 1.0


class MetricAccumulator:
    """Sums over the steps since the last metrics line; they stay on the device until the line is written."""

    def __init__(self, device: torch.device, interval: tuple[float, float]) -> None:
        self.first_t, self.last_t = interval
        self.sums = torch.zeros(2, QUARTERS, device=device)
        self.start_time = time.monotonic()
        self.images = 0
        self.waited = 0.0

    @torch.no_grad()
    def add(self, losses: Tensor, t: Tensor) -> None:
        """Add the losses [N] of one micro-batch at times t [N]; losses that are not finite are left out."""
        share = (t - self.first_t) / (self.last_t - self.first_t)
        quarter = (share * QUARTERS).long().clamp(0, QUARTERS - 1)
        counted = losses.detach().isfinite()
        self.sums[0].index_add_(0, quarter, losses.detach().float().where(counted, 0.0))
        self.sums[1].index_add_(0, quarter, counted.float())

    def gathered(self, group: Any) -> tuple[str, ...]:
        """The sums of every rank, for a checkpoint inside the interval; all ranks must call it."""
        sums = [""] * dist.get_world_size(group)
        dist.all_gather_object(sums, self.sums.cpu().numpy().tobytes().hex(), group=group)
        return tuple(sums)

    def restore(self, gathered: tuple[str, ...], rank: int) -> None:
        """Continue from gathered sums; if the number of ranks has changed, only their total is kept."""
        parts = [torch.frombuffer(bytearray.fromhex(part), dtype=torch.float32) for part in gathered]
        if len(parts) == dist.get_world_size():
            self.sums.copy_(parts[rank].view_as(self.sums))
        elif parts and rank == 0:
            self.sums.copy_(torch.stack(parts).sum(0).view_as(self.sums))

    def summary(self, group: Any) -> dict[str, Any]:
        """The interval's part of a metrics line, over all ranks; all ranks must call it.

        `group` is a gloo process group. Losses are means; data_seconds and memory_bytes are the maximum over
        the ranks.
        """
        dist.all_reduce(self.sums)
        losses, counts = self.sums.double().cpu()
        most = torch.tensor([self.waited, memory_bytes(self.sums.device)], dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        quarters = [finite((a / b).item()) if b else None for a, b in zip(losses, counts, strict=True)]
        return {
            "loss": (losses.sum() / counts.sum()).item(),
            "loss_by_quarter_of_t": quarters,
            "images_per_s": self.images / (time.monotonic() - self.start_time),
            "data_seconds": most[0].item(),
            "memory_bytes": int(most[1].item()),
        }


class TrainLog:
    """Writes metrics.jsonl, held_out.jsonl and status.json, on rank 0 only; `export` gets each line, too."""

    def __init__(
        self,
        directory: Path,
        metrics: Path,
        job: str,
        images: int,
        export: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        self.directory, self.metrics, self.job, self.images = directory, metrics, job, images
        self.export = export
        self.validation = metrics.with_name("held_out.jsonl")
        self.facts: dict[str, Any] = {"job": job}
        self._status_at = 0.0

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will train again."""
        for path in (self.metrics, self.validation):
            if path.exists():
                records = [record for record in read_lines(path) if record["step"] <= step]
                write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))

    def line(self, record: dict[str, Any]) -> None:
        """Append one metrics line."""
        line = {key: finite(value) for key, value in record.items()}
        append_line(self.metrics, line)
        self.export(line)
        self.facts |= {key: finite(record[key]) for key in ("loss", "lr", "images_per_s")}

    def validation_line(self, record: dict[str, Any]) -> None:
        """Append one measurement of the validation loss."""
        append_line(self.validation, record)
        if record["loss"] is not None:
            self.facts["held_out_loss"] = record["loss"]
            self.export({**record, "loss": None, "held_out_loss": record["loss"]})

    def status(self, state: TrainState, phase: str = "running", now: bool = False) -> None:
        """Rewrite status.json, at most once a second unless `now`."""
        seconds = time.monotonic()
        if not now and seconds - self._status_at < STATUS_SECONDS:
            return
        self._status_at = seconds
        loss = self.facts.get("loss")
        message = f"step {state.step:,}" + (f", loss {loss:.4f}" if loss is not None else "")
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
        write_status(self.directory, progress, phase, **facts)


def finite(value: Any) -> Any:
    """The value, or None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
