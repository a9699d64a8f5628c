"""Exponential moving averages of the weights, kept where ZeRO keeps its float32 weights.

Each rank averages only its own partition of the optimizer's float32 weights: no communication, and
1/ranks of the memory for each width. The three attribute names are DeepSpeed's own and private; this
module alone knows them, and a test holds them for every ZeRO stage.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_core.training.schedule import ema_decay

_PARTITIONS = (
    "single_partition_of_fp32_groups",  # ZeRO 1 and 2
    "fp32_groups_flat_partition",  # BF16_Optimizer
    "fp32_partitioned_groups_flat",  # ZeRO 3
)


def float32_partitions(engine: Any) -> list[Tensor]:
    """The partitions, on this rank, of the float32 weights, one flat tensor for each parameter group."""
    for name in _PARTITIONS:
        partitions = getattr(engine.optimizer, name, None)
        if partitions is not None:
            return [partition.detach() for partition in partitions]
    raise RuntimeError(
        f"{type(engine.optimizer).__name__} keeps its float32 weights where this version does not look"
    )


class Averages:
    """Moving averages of several decays, each sharded like the optimizer's weights."""

    def __init__(self, engine: Any, decays: tuple[float, ...], warmup: bool) -> None:
        self.engine, self.warmup = engine, warmup
        self.shards = {decay: [part.clone() for part in float32_partitions(engine)] for decay in decays}

    @torch.no_grad()
    def update(self, applied_steps: int) -> None:
        """Move each average by (1 - decay) (weights - average); call it after an applied step."""
        weights = float32_partitions(self.engine)
        for decay, shards in self.shards.items():
            step = 1 - ema_decay(decay, applied_steps, self.warmup)
            for shard, weight in zip(shards, weights, strict=True):
                shard.lerp_(weight, step)

    def weights(self, decay: float) -> dict[str, Tensor]:
        """The whole average on every rank, by parameter name; all ranks must call it."""
        with self._in_place_of_the_weights(decay):
            return whole_weights(self.engine)

    def load(self, decay: float, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole average; any number of ranks may have written it."""
        kept = [part.clone() for part in float32_partitions(self.engine)]
        for name, parameter in self.engine.module.named_parameters():
            _set_weight(parameter, weights[name])
        for shard, weight, own in zip(self.shards[decay], float32_partitions(self.engine), kept, strict=True):
            shard.copy_(weight)
            weight.copy_(own)

    @contextmanager
    def _in_place_of_the_weights(self, decay: float) -> Generator[None]:
        partitions = float32_partitions(self.engine)
        kept = [part.clone() for part in partitions]
        for part, shard in zip(partitions, self.shards[decay], strict=True):
            part.copy_(shard)
        try:
            yield
        finally:
            for part, own in zip(partitions, kept, strict=True):
                part.copy_(own)


def _set_weight(parameter: Any, value: Tensor) -> None:
    """Set this rank's part of the float32 weight of a parameter."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value)
        return
    # ZeRO 3 pads each parameter to equal parts, and DeepSpeed 0.19 forgets that when it cuts a whole value.
    size = parameter.ds_tensor.ds_numel
    padded = value.new_zeros(size * dist.get_world_size())
    padded[: value.numel()] = value.flatten()
    safe_set_local_fp32_param(parameter, padded[size * dist.get_rank() :][:size])


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """The float32 weights, whole, on the CPU of every rank; all ranks must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        weight = safe_get_full_fp32_param(parameter)
        if weight is None:
            raise RuntimeError(f"ZeRO has no float32 weight for {name}")
        whole[name] = weight.detach().to("cpu", torch.float32, copy=True)
    return whole
