"""Training metrics: sums over a logging interval, for one line of metrics.jsonl."""

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_core.training.mfu import memory_bytes

QUARTERS = 4


class MetricAccumulator:
    """Sums over the steps since the last metrics line, kept on the device until the line is written."""

    def __init__(self, device: torch.device, interval: tuple[float, float]) -> None:
        self.first_t, self.last_t = interval
        self.sums = torch.zeros(2, QUARTERS, device=device)
        self.start_time = time.monotonic()
        self.images = 0
        self.waited = 0.0

    @torch.no_grad()
    def add(self, losses: Tensor, t: Tensor) -> None:
        """Add the losses [N] of one micro-batch at times t [N]; non-finite losses are omitted."""
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


def finite(value: Any) -> Any:
    """The value, or None if it is not finite, which JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
