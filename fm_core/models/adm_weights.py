"""Weights of the public ADM UNets (guided-diffusion, torchcfm and others that kept its names) for ours."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fm_core.models.blocks import Attention, Downsample, ResidualBlock, Upsample
from fm_core.models.layers import Conv2d, GroupNorm32
from fm_core.models.unet import TimestepSequential, UNet

AttentionOrder = Literal["legacy", "new"]
GROUPS = 32
"""Groups of every normalisation there."""

_INSIDE: dict[type[nn.Module], dict[str, str]] = {
    ResidualBlock: {
        "first_norm": "in_layers.0",
        "first": "in_layers.2",
        "condition": "emb_layers.1",
        "second_norm": "out_layers.0",
        "second": "out_layers.3",
        "skip": "skip_connection",
    },
    Attention: {"norm": "norm", "queries_keys_values": "qkv", "projection": "proj_out"},
    Downsample: {"convolution": "op"},
    Upsample: {"convolution": "conv"},
}
_OUTSIDE = {
    "conditioning.inner": "time_embed.0",
    "conditioning.outer": "time_embed.2",
    "conditioning.label": "label_emb",
    "first": "input_blocks.0.0",
    "last_norm": "out.0",
    "last": "out.2",
}


def is_adm(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are named as guided-diffusion names them."""
    return "input_blocks.0.0.weight" in weights


def from_adm(
    weights: Mapping[str, Tensor], network: UNet, attention: AttentionOrder = "legacy"
) -> dict[str, Tensor]:
    """The state dict of `network` that computes what the public UNet computes with `weights`.

    `attention` is what use_new_attention_order was there. The network must embed the time as those weights
    expect it: time_scale 1000 where they were trained on times up to 1000, 1 where on times up to 1. Where
    they know no null label, ours becomes a row of zeros.

    Raises ValueError, naming the first tensor that is missing, left over or of another shape, and for a
    network whose normalisations have not 32 groups, which none of the public ones has.
    """
    for name, module in network.named_modules():
        if isinstance(module, GroupNorm32) and module.groups != GROUPS:
            raise ValueError(f"{name} has {module.groups} groups and the public networks have {GROUPS}")
    left, found = dict(weights), dict[str, Tensor]()
    for ours, theirs in _layers(network):
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in network.state_dict():
                if f"{theirs}.{kind}" not in left:
                    raise ValueError(f"{theirs}.{kind} is missing from the weights")
                value = left.pop(f"{theirs}.{kind}")
                found[f"{ours}.{kind}"] = _converted(value, ours, network, attention)
    if left:
        raise ValueError(f"{min(left)} has no place in the network")
    for name, weight in network.state_dict().items():
        if found[name].shape != weight.shape:
            shapes = f"{list(found[name].shape)} there and {list(weight.shape)} here"
            raise ValueError(f"{name} is {shapes}")
    return found


def _layers(network: UNet) -> Iterator[tuple[str, str]]:
    """Names of the same layer in ours and theirs."""
    there = dict(network.named_modules())
    yield from ((ours, theirs) for ours, theirs in _OUTSIDE.items() if there.get(ours) is not None)
    stages: list[tuple[str, str]] = [("middle", "middle_block")]
    stages += [(f"down.{number}", f"input_blocks.{number + 1}") for number in range(len(network.down))]
    stages += [(f"up.{number}", f"output_blocks.{number}") for number in range(len(network.up))]
    for ours, theirs in stages:
        stage = there[ours]
        assert isinstance(stage, TimestepSequential)
        for number, block in enumerate(stage.blocks):
            for inner, public in _INSIDE[type(block)].items():
                if getattr(block, inner) is not None:
                    yield f"{ours}.blocks.{number}.{inner}", f"{theirs}.{number}.{public}"


def _converted(value: Tensor, name: str, network: UNet, attention: AttentionOrder) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    module = network.get_submodule(name)
    if isinstance(module, Conv2d):
        return value.permute(0, 2, 3, 1).contiguous() if value.dim() == 4 else value
    if isinstance(module, nn.Embedding) and len(value) == module.num_embeddings - 1:
        return torch.cat([value, value.new_zeros(1, value.shape[1])])
    if value.dim() == 3:  # attention's dense layers are convolutions over the pixels there
        value = value.squeeze(2)
    if leaf == "queries_keys_values" and attention == "legacy":
        block = network.get_submodule(parent)
        assert isinstance(block, Attention)
        # There: head by head its queries, keys and values. Here: all queries, all keys, all values.
        heads = value.unflatten(0, (-1, 3, block.head_channels))
        return heads.transpose(0, 1).flatten(0, 2).contiguous()
    return value
