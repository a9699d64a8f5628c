"""Validation loss, on the same images, times and noise for every run and any number of processes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from fm_core.method.objectives import Objective
from fm_core.training.batch_source import BatchSource
from fm_core.training.engine import network_for

SEED = 0
"""Seed of times and noise: the same for all runs, so that their losses are comparable."""


class SequentialSampler:
    """The ids of a split in a fixed order, repeated indefinitely."""

    def __init__(self, order: NDArray[np.int64]) -> None:
        self.order = order

    def ids(self, position: int, count: int) -> NDArray[np.int64]:
        """The ids at stream positions position .. position + count - 1; int64 [count]."""
        return self.order[np.arange(position, position + count, dtype=np.int64) % len(self.order)]


class ValidationLoss:
    """Mean loss on the first images of the validation split."""

    def __init__(self, source: BatchSource, images: int, micro_batch: int) -> None:
        """`source` reads the images in order; each rank evaluates `micro_batch` of them at a time."""
        self.source, self.images, self.micro_batch = source, images, micro_batch

    @torch.no_grad()
    def loss(
        self,
        engine: Any,
        objective: Objective,
        conditional: bool,
        device: torch.device,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> float | None:
        """Mean loss without dropout, None if it is not finite; all ranks must call it.

        `heartbeat` is called before each forward pass. Training is unaffected, because its random generators
        are not used.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        # Under ZeRO 3 all ranks must run the same number of forward passes; surplus images are not counted.
        rounds = -(-self.images // (ranks * self.micro_batch))
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        engine.eval()
        network = network_for(objective, engine)
        try:
            with self.source.batches(
                0, rounds * ranks * self.micro_batch, rank, ranks, self.micro_batch
            ) as batches:
                for _ in range(rounds):
                    heartbeat()
                    batch = next(batches)
                    sample, label = self.source.draw(batch, device)
                    losses = objective.loss(network, sample, label if conditional else None)
                    counted = torch.tensor([position < self.images for position in batch.positions])
                    counted = counted.to(device, torch.float64)
                    sums += torch.stack([(losses.double() * counted).sum(), counted.sum()])
        finally:
            engine.train()
        dist.all_reduce(sums)
        mean = (sums[0] / sums[1]).item()
        return mean if np.isfinite(mean) else None
