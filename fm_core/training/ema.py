"""Exponential moving averages of the weights, kept where ZeRO keeps its float32 weights.

Each rank averages only its own parts of the optimizer's float32 weights: no communication, and 1/ranks of
the memory for each average. They move only when a step was applied, and are exact under every ZeRO stage.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fm_core.training.lr_schedule import Decay
from fm_core.training.zero_state import Shards, float32_partitions


class ModelEMA:
    """Several moving averages, by name, each cut like the optimizer's weights."""

    def __init__(self, engine: Any, decays: Mapping[str, Decay]) -> None:
        """Begin with the present weights; `decays` gives each average's decay by applied steps."""
        self.engine, self.decays = engine, decays
        self.shards: dict[str, Shards] = {
            name: [part.clone() for part in float32_partitions(engine)] for name in decays
        }

    @torch.no_grad()
    def update(self, applied_steps: int) -> None:
        """Move each by (1 - decay) (weights - average) after a step; `applied_steps` were made before it."""
        weights = float32_partitions(self.engine)
        for name, shards in self.shards.items():
            step = 1 - self.decays[name](applied_steps)
            for shard, weight in zip(shards, weights, strict=True):
                shard.lerp_(weight, step)
