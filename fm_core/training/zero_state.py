"""Whole tensors from what ZeRO cuts up among the ranks, and back.

On each rank ZeRO keeps flat parts of the float32 weights and of AdamW's two moments, one tensor for each
parameter group. Whatever is cut like the weights ("shards") is put together, or cut again for any number of
ranks, in the weights' place. The attribute names are DeepSpeed's own and private; this module alone knows
them, and a test holds them for every ZeRO stage.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

Shards = list[Tensor]
Read = Callable[[str], Tensor]
"""Gives the whole float32 tensor of a parameter by name; called on rank 0 alone."""

MOMENTS = ("exp_avg", "exp_avg_sq")

_PARTITIONS = (
    "single_partition_of_fp32_groups",  # ZeRO 1 and 2
    "fp32_groups_flat_partition",  # BF16_Optimizer
    "fp32_partitioned_groups_flat",  # ZeRO 3
)


def float32_partitions(engine: Any) -> Shards:
    """The parts, on this rank, of the float32 weights; writing to them moves the weights of the next step."""
    return [partition.detach() for partition in _partitions(engine)]


def moments(engine: Any) -> dict[str, Shards]:
    """The parts, on this rank, of AdamW's moments, by name; zeros before the first step."""
    states = [_adam_state(engine, partition) for partition in _partitions(engine)]
    return {name: [state[name] for state in states] for name in MOMENTS}


def set_applied_steps(engine: Any, steps: int) -> None:
    """Tell AdamW how many steps it has made."""
    for partition in _partitions(engine):
        _adam_state(engine, partition)["step"].fill_(float(steps))


@torch.no_grad()
def gather_full(engine: Any, shards: Shards, keep: bool = True) -> dict[str, Tensor]:
    """The whole float32 tensors of shards on the CPU, by parameter; all ranks must call it.

    Ranks that do not `keep` them get an empty dict, and save the memory.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    tensors: dict[str, Tensor] = {}
    with _in_place_of_the_weights(engine, shards):
        for name, parameter in engine.module.named_parameters():
            tensor = safe_get_full_fp32_param(parameter)
            if tensor is None:
                raise RuntimeError(f"ZeRO has no float32 weight for {name}")
            if keep:
                tensors[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return tensors


@torch.no_grad()
def scatter(engine: Any, shards: Shards, read: Read) -> None:
    """Fill this rank's shards from whole tensors; all ranks must call it, with any number of them."""
    with _in_place_of_the_weights(engine, shards):
        for name, parameter in engine.module.named_parameters():
            _set_float32(parameter, _from_rank_0(engine, parameter, name, read))
        for shard, weight in zip(shards, float32_partitions(engine), strict=True):
            shard.copy_(weight)


@torch.no_grad()
def set_weights(engine: Any, read: Read) -> None:
    """Set the float32 weights and what the network computes with; all ranks must call it."""
    for name, parameter in engine.module.named_parameters():
        value = _from_rank_0(engine, parameter, name, read)
        _set_float32(parameter, value)
        _set_computed_with(parameter, value)


def _partitions(engine: Any) -> Shards:
    for name in _PARTITIONS:
        partitions = getattr(engine.optimizer, name, None)
        if partitions is not None:
            return cast(Shards, list(partitions))
    raise RuntimeError(
        f"{type(engine.optimizer).__name__} keeps its float32 weights where this version does not look"
    )


def _adam_state(engine: Any, partition: Tensor) -> dict[str, Tensor]:
    adam = engine.optimizer.optimizer
    state = adam.state[partition]
    if not state:
        # What torch.optim.AdamW itself begins with.
        device = partition.device if adam.defaults["fused"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state |= {name: torch.zeros_like(partition) for name in MOMENTS}
    return state


@contextmanager
def _in_place_of_the_weights(engine: Any, shards: Shards) -> Generator[None]:
    partitions = float32_partitions(engine)
    kept = [part.clone() for part in partitions]
    for part, shard in zip(partitions, shards, strict=True):
        part.copy_(shard)
    try:
        yield
    finally:
        for part, own in zip(partitions, kept, strict=True):
            part.copy_(own)


def _from_rank_0(engine: Any, parameter: Any, name: str, read: Read) -> Tensor:
    device = float32_partitions(engine)[0].device
    if dist.get_rank() == 0:
        value = read(name).to(device, torch.float32).contiguous()
    else:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        value = torch.empty(shape, dtype=torch.float32, device=device)
    dist.broadcast(value, src=0)
    return value


def _set_float32(parameter: Any, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def _set_computed_with(parameter: Any, value: Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    parameter.ds_tensor.data.copy_(_own_part(parameter, value))
    # ZeRO 3 keeps small parameters whole on every rank as well.
    if parameter.data.shape == value.shape:
        parameter.data.copy_(value)


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """The part, on this rank, of a parameter under ZeRO 3.

    It pads each parameter to equal parts, and DeepSpeed 0.19 forgets that when it cuts a whole value itself.
    """
    size = parameter.ds_tensor.ds_numel
    padded = value.new_zeros(size * dist.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * dist.get_rank() :][:size]
