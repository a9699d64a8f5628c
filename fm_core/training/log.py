"""What training says of itself: one metrics line for each interval, and the present status."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_core.run.files import append_line, read_lines, write_text
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.training.checkpoint import TrainState

QUARTERS = 4
STATUS_SECONDS = 1.0


class Interval:
    """Sums over the steps since the last metrics line; they stay on the device until it is written."""

    def __init__(self, device: torch.device, interval: tuple[float, float]) -> None:
        self.start, self.end = interval
        self.sums = torch.zeros(2, QUARTERS, device=device)
        self.began = time.monotonic()
        self.images = 0
        self.waited = 0.0

    @torch.no_grad()
    def add(self, losses: Tensor, t: Tensor) -> None:
        """Count the losses [N] of one micro-batch at times t [N]."""
        share = (t - self.start) / (self.end - self.start)
        quarter = (share * QUARTERS).long().clamp(0, QUARTERS - 1)
        self.sums[0].index_add_(0, quarter, losses.detach().float())
        self.sums[1].index_add_(0, quarter, torch.ones_like(losses, dtype=torch.float32))

    def gathered(self, group: Any) -> tuple[str, ...]:
        """The sums of every rank, for a checkpoint inside the interval; all ranks must call it."""
        sums = [""] * dist.get_world_size(group)
        dist.all_gather_object(sums, self.sums.cpu().numpy().tobytes().hex(), group=group)
        return tuple(sums)

    def restore(self, gathered: tuple[str, ...], rank: int) -> None:
        """Go on from gathered sums; where the number of ranks has changed only their total is kept."""
        parts = [torch.frombuffer(bytearray.fromhex(part), dtype=torch.float32) for part in gathered]
        if len(parts) == dist.get_world_size():
            self.sums.copy_(parts[rank].view_as(self.sums))
        elif parts and rank == 0:
            self.sums.copy_(torch.stack(parts).sum(0).view_as(self.sums))

    def summary(self) -> tuple[float, list[float | None]]:
        """Mean loss and mean loss by quarter of t over all ranks; all ranks must call it."""
        dist.all_reduce(self.sums)
        losses, counts = self.sums.double().cpu()
        quarters = [finite((a / b).item()) if b else None for a, b in zip(losses, counts, strict=True)]
        return (losses.sum() / counts.sum()).item(), quarters


class TrainLog:
    """Writes metrics.jsonl and status.json; made on rank 0 alone. `export` gets a copy of each line."""

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
        self.facts: dict[str, Any] = {"job": job}
        self._status_at = 0.0

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will train again."""
        if not self.metrics.exists():
            return
        kept = [record for record in read_lines(self.metrics) if record["step"] <= step]
        write_text(self.metrics, "".join(f"{json.dumps(record)}\n" for record in kept))

    def line(self, record: dict[str, Any]) -> None:
        """Append one metrics line."""
        line = {key: finite(value) for key, value in record.items()}
        append_line(self.metrics, line)
        self.export(line)
        self.facts |= {key: finite(record[key]) for key in ("loss", "lr", "images_per_s")}

    def status(self, state: TrainState, phase: str = "running", now: bool = False) -> None:
        """Rewrite status.json, at most once a second unless told to now."""
        moment = time.monotonic()
        if not now and moment - self._status_at < STATUS_SECONDS:
            return
        self._status_at = moment
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
