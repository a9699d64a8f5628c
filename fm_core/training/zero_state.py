"""Sharded float32 state of ZeRO: gather full tensors from the ranks and scatter them.

On each rank ZeRO keeps flat partitions of the float32 weights and of AdamW's two moments, one tensor for each
parameter group. Tensors that are partitioned like the weights ("shards") are gathered, or scattered to any
number of ranks, by temporarily swapping them with the weights. The attribute names are private to DeepSpeed;
only this module uses them, and a test checks them for every ZeRO stage.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fm_core.checkpoint.format import OPTIMIZER, RAW, no_progress
from fm_core.checkpoint.save_load import Heartbeat, ReadTensor

Shards = list[Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")

_PARTITIONS = (
    "single_partition_of_fp32_groups",  # ZeRO 1 and 2
    "fp32_groups_flat_partition",  # BF16_Optimizer
    "fp32_partitioned_groups_flat",  # ZeRO 3
)


class ZeroState:
    """ShardedState of a checkpoint with the weights, AdamW's moments and averages of an engine."""

    def __init__(self, engine: Any, averages: Mapping[str, Shards]) -> None:
        """`averages` are shards by name, partitioned like the weights."""
        self.engine, self.averages = engine, averages

    @property
    def parts(self) -> Sequence[str]:
        """Names of the parts: the weights, each moment, each average."""
        return [RAW, *(f"{OPTIMIZER}/{name}" for name in MOMENTS), *self.averages]

    def gather(self, part: str, keep: bool = True, heartbeat: Heartbeat = no_progress) -> dict[str, Tensor]:
        """The full float32 tensors of a part; see `gather_full`."""
        return gather_full(
            self.engine, self._shards(part), keep, lambda name: heartbeat(f"gathering {name} of {part}")
        )

    def scatter(self, part: str, read: ReadTensor) -> None:
        """Fill this rank's shards of a part from full tensors; all ranks, however many, must call it."""
        if part == RAW:
            set_weights(self.engine, read)
        else:
            scatter(self.engine, self._shards(part), read)

    def set_applied_steps(self, steps: int) -> None:
        """Set AdamW's step count."""
        set_applied_steps(self.engine, steps)

    def _shards(self, part: str) -> Shards:
        if part == RAW:
            return float32_partitions(self.engine)
        folder, _, moment = part.rpartition("/")
        return moments(self.engine)[moment] if folder == OPTIMIZER else self.averages[part]


def float32_partitions(engine: Any) -> Shards:
    """Partitions of the float32 weights on this rank; writes to them change the weights of the next step."""
    return [partition.detach() for partition in _partitions(engine)]


def moments(engine: Any) -> dict[str, Shards]:
    """Partitions of AdamW's moments on this rank, by name; zeros before the first step."""
    states = [_adam_state(engine, partition) for partition in _partitions(engine)]
    return {name: [state[name] for state in states] for name in MOMENTS}


def set_applied_steps(engine: Any, steps: int) -> None:
    """Set AdamW's step count."""
    for partition in _partitions(engine):
        _adam_state(engine, partition)["step"].fill_(float(steps))


@torch.no_grad()
def gather_full(
    engine: Any, shards: Shards, keep: bool = True, before: Heartbeat = no_progress
) -> dict[str, Tensor]:
    """The full float32 tensors of shards on the CPU, by parameter; all ranks must call it.

    Ranks that do not `keep` them get an empty dict, which saves the memory. `before` is called with the name
    of each tensor before it is gathered.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    tensors: dict[str, Tensor] = {}
    with _swapped_into_weights(engine, shards):
        for name, parameter in engine.module.named_parameters():
            before(name)
            tensor = safe_get_full_fp32_param(parameter)
            if tensor is None:
                raise RuntimeError(f"ZeRO has no float32 weight for {name}")
            if keep:
                tensors[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return tensors


@torch.no_grad()
def scatter(engine: Any, shards: Shards, read: ReadTensor) -> None:
    """Fill this rank's shards from full tensors; all ranks, however many, must call it."""
    with _swapped_into_weights(engine, shards):
        for name, parameter in engine.module.named_parameters():
            _set_float32(parameter, _from_rank_0(engine, parameter, name, read))
        for shard, weight in zip(shards, float32_partitions(engine), strict=True):
            shard.copy_(weight)


@torch.no_grad()
def set_weights(engine: Any, read: ReadTensor) -> None:
    """Set the float32 weights and the weights that the network computes with; all ranks must call it."""
    for name, parameter in engine.module.named_parameters():
        value = _from_rank_0(engine, parameter, name, read)
        _set_float32(parameter, value)
        _set_compute_weights(parameter, value)


def _partitions(engine: Any) -> Shards:
    for name in _PARTITIONS:
        partitions = getattr(engine.optimizer, name, None)
        if partitions is not None:
            return cast(Shards, list(partitions))
    raise RuntimeError(
        f"{type(engine.optimizer).__name__} has none of the attributes {', '.join(_PARTITIONS)}"
    )


def _adam_state(engine: Any, partition: Tensor) -> dict[str, Tensor]:
    adam = engine.optimizer.optimizer
    state = adam.state[partition]
    if not state:
        # The initial state of torch.optim.AdamW.
        device = partition.device if adam.defaults["fused"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state |= {name: torch.zeros_like(partition) for name in MOMENTS}
    return state


@contextmanager
def _swapped_into_weights(engine: Any, shards: Shards) -> Generator[None]:
    partitions = float32_partitions(engine)
    saved = [part.clone() for part in partitions]
    for part, shard in zip(partitions, shards, strict=True):
        part.copy_(shard)
    try:
        yield
    finally:
        for part, own in zip(partitions, saved, strict=True):
            part.copy_(own)


def _from_rank_0(engine: Any, parameter: Any, name: str, read: ReadTensor) -> Tensor:
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
        safe_set_local_fp32_param(parameter, _own_partition(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def _set_compute_weights(parameter: Any, value: Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    parameter.ds_tensor.data.copy_(_own_partition(parameter, value))
    # ZeRO 3 also keeps small parameters in full on every rank.
    if parameter.data.shape == value.shape:
        parameter.data.copy_(value)


def _own_partition(parameter: Any, value: Tensor) -> Tensor:
    """The partition of a parameter on this rank under ZeRO 3.

    ZeRO 3 pads each parameter to equal partitions; DeepSpeed 0.19 ignores the padding when it partitions a
    full value itself.
    """
    size = parameter.ds_tensor.ds_numel
    padded = value.new_zeros(size * dist.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * dist.get_rank() :][:size]
