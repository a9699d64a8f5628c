"""Conversion of ADM UNet weights (guided-diffusion, torchcfm and others with its parameter names)."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fm_core.models.blocks import Attention, Downsample, ResidualBlock, Upsample
from fm_core.models.layers import Conv2d, GroupNorm32, is_second_time
from fm_core.models.unet import TimestepSequential, UNet

AttentionOrder = Literal["legacy", "new"]
GROUPS = 32
"""Number of groups of every group normalization in the public networks."""

_BLOCK_LAYERS: dict[type[nn.Module], dict[str, str]] = {
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
_TOP_LEVEL_LAYERS = {
    "conditioning.inner": "time_embed.0",
    "conditioning.outer": "time_embed.2",
    "conditioning.label": "label_emb",
    "first": "input_blocks.0.0",
    "last_norm": "out.0",
    "last": "out.2",
}


def is_adm(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the parameter names of guided-diffusion."""
    return "input_blocks.0.0.weight" in weights


def from_adm(
    weights: Mapping[str, Tensor], network: UNet, attention: AttentionOrder = "legacy"
) -> dict[str, Tensor]:
    """Convert weights of a public ADM UNet to a state dict of `network` that computes the same function.

    `attention` is the setting use_new_attention_order of the public network. `network` must embed the time as
    the weights expect it: time_scale 1000 if they were trained on times up to 1000, 1 if on times up to 1. If
    the weights have no null label, its embedding becomes a row of zeros. The embedding of a second time is
    left out.

    Raises:
        ValueError: a tensor is missing, superfluous or of another shape (the message names the first one), or
            a group normalization of `network` does not have 32 groups, as all public ones do.
    """
    for name, module in network.named_modules():
        if isinstance(module, GroupNorm32) and module.groups != GROUPS:
            raise ValueError(f"{name} has {module.groups} groups and the public networks have {GROUPS}")
    remaining, state = dict(weights), dict[str, Tensor]()
    for ours, theirs in _layer_names(network):
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in network.state_dict():
                if f"{theirs}.{kind}" not in remaining:
                    raise ValueError(f"{theirs}.{kind} is missing from the weights")
                value = remaining.pop(f"{theirs}.{kind}")
                state[f"{ours}.{kind}"] = _convert(value, ours, network, attention)
    if remaining:
        raise ValueError(f"{min(remaining)} has no place in the network")
    for name, weight in network.state_dict().items():
        if not is_second_time(name) and state[name].shape != weight.shape:
            shapes = f"{list(state[name].shape)} in the weights and {list(weight.shape)} in the network"
            raise ValueError(f"{name} has the shape {shapes}")
    return state


def drop_variances(weights: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """The weights without the second half of twice as many output channels as `network` has.

    These channels predict variances (guided-diffusion's learn_sigma).
    """
    outputs, names = len(network.last.bias), ("out.2.weight", "out.2.bias")
    means = {name: weights[name][:outputs] for name in names if len(weights.get(name, ())) == 2 * outputs}
    return {**weights, **means}


def _layer_names(network: UNet) -> Iterator[tuple[str, str]]:
    """Pairs of names of the same layer: in `network` and in the public UNet."""
    modules = dict(network.named_modules())
    yield from ((ours, theirs) for ours, theirs in _TOP_LEVEL_LAYERS.items() if modules.get(ours) is not None)
    stages: list[tuple[str, str]] = [("middle", "middle_block")]
    stages += [(f"down.{number}", f"input_blocks.{number + 1}") for number in range(len(network.down))]
    stages += [(f"up.{number}", f"output_blocks.{number}") for number in range(len(network.up))]
    for ours, theirs in stages:
        stage = modules[ours]
        assert isinstance(stage, TimestepSequential)
        for number, block in enumerate(stage.blocks):
            for inner, public in _BLOCK_LAYERS[type(block)].items():
                if getattr(block, inner) is not None:
                    yield f"{ours}.blocks.{number}.{inner}", f"{theirs}.{number}.{public}"


def _convert(value: Tensor, name: str, network: UNet, attention: AttentionOrder) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    module = network.get_submodule(name)
    if isinstance(module, Conv2d):
        return value.permute(0, 2, 3, 1).contiguous() if value.dim() == 4 else value
    if isinstance(module, nn.Embedding) and len(value) == module.num_embeddings - 1:
        return torch.cat([value, value.new_zeros(1, value.shape[1])])
    if value.dim() == 3:  # the public networks implement the linear layers of attention as 1-D convolutions
        value = value.squeeze(2)
    if leaf == "queries_keys_values" and attention == "legacy":
        block = network.get_submodule(parent)
        assert isinstance(block, Attention)
        # Public order: queries, keys and values per head. Order here: all queries, all keys, all values.
        heads = value.unflatten(0, (-1, 3, block.head_channels))
        return heads.transpose(0, 1).flatten(0, 2).contiguous()
    return value
