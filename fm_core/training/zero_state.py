"""Sharded float32 state of ZeRO: where its elements are, and full tensors scattered to the ranks.

On each rank ZeRO keeps flat partitions of the float32 weights and of AdamW's two moments, one tensor for each
parameter group. Tensors that are partitioned like the weights ("shards") are saved from where they are, and
filled on any number of ranks by temporarily swapping them with the weights. The attribute names are private
to DeepSpeed; only this module uses them, and a test checks them for every ZeRO stage.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fm_core.checkpoint.checkpoint_loader import ReadTensor
from fm_core.checkpoint.format import OPTIMIZER, RAW
from fm_core.checkpoint.tensor_layout import Fragment

Shards = list[Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")

_PARTITIONS = (
    "single_partition_of_fp32_groups",  # ZeRO 1 and 2
    "fp32_groups_flat_partition",  # BF16_Optimizer
    "fp32_partitioned_groups_flat",  # ZeRO 3
)


class ZeroState:
    """Sharded state of a checkpoint with the weights, AdamW's moments and averages of an engine."""

    def __init__(self, engine: Any, averages: Mapping[str, Shards]) -> None:
        """`averages` are shards by name, partitioned like the weights."""
        self.engine, self.averages = engine, averages

    @property
    def parts(self) -> Sequence[str]:
        """Names of the parts: the weights, each moment, each average."""
        return [RAW, *(f"{OPTIMIZER}/{name}" for name in MOMENTS), *self.averages]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by name, the same for all parts."""
        named = self.engine.module.named_parameters()
        return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}

    def fragments(self) -> list[Fragment]:
        """What this rank holds of each parameter, the same for all parts."""
        return fragments(self.engine)

    def shards(self, part: str) -> Shards:
        """Shards of a part that this rank holds; not a copy."""
        if part == RAW:
            return float32_partitions(self.engine)
        folder, _, moment = part.rpartition("/")
        return moments(self.engine)[moment] if folder == OPTIMIZER else self.averages[part]

    def scatter(self, part: str, read: ReadTensor) -> None:
        """Fill this rank's shards of a part from full tensors; all ranks, however many, must call it."""
        if part == RAW:
            set_weights(self.engine, read)
        else:
            scatter(self.engine, self.shards(part), read)

    def set_applied_steps(self, steps: int) -> None:
        """Set AdamW's step count."""
        set_applied_steps(self.engine, steps)


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


def fragments(engine: Any) -> list[Fragment]:
    """Where this rank's partitions of the float32 weights hold elements of each parameter."""
    partitions = float32_partitions(engine)
    held: list[Fragment] = []
    for name, parameter in engine.module.named_parameters():
        start, elements = _own_elements(parameter)
        if not elements.numel():
            continue
        shard, offset = _position(elements, partitions, name)
        held.append(Fragment(name, start, elements.numel(), shard, offset))
    return held


def _own_elements(parameter: Any) -> tuple[int, Tensor]:
    """Index of the first element of a parameter that this rank holds, and a view of what it holds."""
    from deepspeed.utils import safe_get_local_fp32_param

    if hasattr(parameter, "ds_id"):
        # Without the padding of the last partition.
        start = parameter.ds_tensor.ds_numel * dist.get_rank()
        local = cast(Tensor, safe_get_local_fp32_param(parameter))
        return start, local[: max(0, parameter.ds_numel - start)]
    mapping = getattr(parameter, "_hp_mapping", None)
    return (mapping.lp_fragment_address.start, mapping.hp_fragment) if mapping else (0, torch.empty(0))


def _position(elements: Tensor, partitions: Shards, name: str) -> tuple[int, int]:
    """Number of the partition that contains these elements, and the index of the first one in it."""
    for number, partition in enumerate(partitions):
        offset = (elements.data_ptr() - partition.data_ptr()) // partition.element_size()
        if 0 <= offset <= partition.numel() - elements.numel():
            return number, offset
    raise RuntimeError(f"no partition of ZeRO holds the float32 weights of {name}")


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
