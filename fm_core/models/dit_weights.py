"""Conversion of published DiT and SiT weights, which have the same parameter names and shapes.

Their position embedding has the column in the first half of the channels and the row in the second; that of
`Transformer` is the other way round. Both halves of the tokens' channels are therefore exchanged in every
layer that reads or writes them. The position embedding itself is checked and not stored.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_core.config.sizes import SIZES
from fm_core.models.transformer import Transformer, sinusoidal_positions

POSITIONS = "pos_embed"
HEADS = {
    (size["width"], size["depth"]): size["heads"] for size in SIZES.values() if size["kind"] == "transformer"
}
"""Attention heads of the published networks by width and depth; they are visible in no shape."""


@dataclass(frozen=True)
class _Parameter:
    ours: str
    theirs: str
    shape: tuple[int, ...]
    """Shape in the published file."""
    convert: Callable[[Tensor], Tensor]


def is_dit(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict has the parameter names of DiT and SiT."""
    return "x_embedder.proj.weight" in weights


def from_dit(weights: Mapping[str, Tensor], network: Transformer) -> dict[str, Tensor]:
    """Convert published weights to a state dict of `network` that computes the same function.

    The time is that of the published network: see `fm_core.models.published_weights`. Output channels for
    variances are dropped. If the weights have no null label, its embedding becomes a row of zeros.

    Raises:
        ValueError: a tensor is missing, superfluous or of another shape; the message names the first one.
    """
    channels, remaining = network.image_shape[0], dict(weights)
    remaining.pop(POSITIONS, None)
    variances = len(weights.get("final_layer.linear.bias", ())) == 2 * len(network.last.bias)
    state = dict[str, Tensor]()
    for parameter in _parameters(network, 2 * channels if variances else channels):
        if parameter.theirs not in remaining:
            raise ValueError(f"{parameter.theirs} is missing; it should be {list(parameter.shape)}")
        value = remaining.pop(parameter.theirs)
        if parameter.theirs.startswith("y_embedder.") and len(value) == parameter.shape[0] - 1:
            value = torch.cat([value, value.new_zeros(1, *value.shape[1:])])
        if tuple(value.shape) != parameter.shape:
            raise ValueError(
                f"{parameter.theirs} is {list(value.shape)}, and this network needs {list(parameter.shape)}"
            )
        state[parameter.ours] = parameter.convert(value)
    if remaining:
        raise ValueError(f"{min(remaining)} has no place in this network")
    _check_positions(weights, network)
    return state


def check_heads(network: Transformer) -> None:
    """Check the attention heads of a network of a published width and depth. Raises ValueError."""
    width, heads = len(network.first.bias), network.heads
    known = HEADS.get((width, len(network.blocks)), heads)
    if heads != known:
        raise ValueError(
            f"model.heads {heads}: the published network of width {width} and depth {len(network.blocks)} "
            f"has {known}"
        )


def transformer_keys(weights: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """The keys of the model section, and image_shape and classes, that the shapes of published weights imply.

    `heads` is needed for networks that are not of a published size. The number of classes is one less than
    the rows of the label embedding, the last of which is the null label.

    Raises:
        ValueError: a tensor is missing, or the number of heads is not known or another one.
    """
    for name in ("x_embedder.proj.weight", POSITIONS, "y_embedder.embedding_table.weight"):
        if name not in weights:
            raise ValueError(f"{name} is missing")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    blocks = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    known = HEADS.get((width, len(blocks)))
    if not (heads or known):
        raise ValueError(f"no published network has width {width} and {len(blocks)} blocks; give its heads")
    if heads and known and heads != known:
        raise ValueError(
            f"heads {heads}: the published network of width {width} and {len(blocks)} blocks has {known}; "
            "leave heads out"
        )
    side = math.isqrt(weights[POSITIONS].shape[1]) * patch
    return {
        "model": {
            "kind": "transformer",
            "patch": patch,
            "width": width,
            "depth": len(blocks),
            "heads": heads or known,
            "class_conditional": True,
        },
        "image_shape": (channels, side, side),
        "classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
    }


def _parameters(network: Transformer, outputs: int) -> Iterator[_Parameter]:
    """Every parameter, in the order of the forward pass; the published network has `outputs` channels."""
    width, channels, patch = len(network.first.bias), network.image_shape[0], network.patch

    def swap(dim: int) -> Callable[[Tensor], Tensor]:
        return lambda value: value.roll(width // 2, dim)

    def layer(
        ours: str, theirs: str, weight: Callable[[Tensor], Tensor], bias: Callable[[Tensor], Tensor]
    ) -> Iterator[_Parameter]:
        for kind, convert in (("weight", weight), ("bias", bias)):
            shape = tuple(network.get_parameter(f"{ours}.{kind}").shape)
            yield _Parameter(f"{ours}.{kind}", f"{theirs}.{kind}", shape, convert)

    yield _Parameter(
        "first.weight",
        "x_embedder.proj.weight",
        (width, channels, patch, patch),
        lambda value: swap(0)(value.permute(0, 2, 3, 1).flatten(1)),
    )
    yield _Parameter("first.bias", "x_embedder.proj.bias", (width,), swap(0))
    yield from layer("conditioning.inner", "t_embedder.mlp.0", _same, _same)
    yield from layer("conditioning.outer", "t_embedder.mlp.2", _same, _same)
    if network.conditioning.label is not None:
        shape = tuple(network.conditioning.label.weight.shape)
        yield _Parameter("conditioning.label.weight", "y_embedder.embedding_table.weight", shape, _same)
    for number in range(len(network.blocks)):
        ours, theirs = f"blocks.{number}", f"blocks.{number}"
        each = _in_chunks(width)
        yield from layer(f"{ours}.modulation.dense", f"{theirs}.adaLN_modulation.1", each, each)
        yield from layer(f"{ours}.queries_keys_values", f"{theirs}.attn.qkv", swap(1), _same)
        yield from layer(f"{ours}.projection", f"{theirs}.attn.proj", swap(0), swap(0))
        yield from layer(f"{ours}.inner", f"{theirs}.mlp.fc1", swap(1), _same)
        yield from layer(f"{ours}.outer", f"{theirs}.mlp.fc2", swap(0), swap(0))
    each = _in_chunks(width)
    yield from layer("last_modulation.dense", "final_layer.adaLN_modulation.1", each, each)

    def means(value: Tensor) -> Tensor:
        return value.unflatten(0, (-1, outputs))[:, :channels].flatten(0, 1)

    rows = patch * patch * outputs
    yield _Parameter(
        "last.weight", "final_layer.linear.weight", (rows, width), lambda value: swap(1)(means(value))
    )
    yield _Parameter("last.bias", "final_layer.linear.bias", (rows,), means)


def _same(value: Tensor) -> Tensor:
    return value


def _in_chunks(width: int) -> Callable[[Tensor], Tensor]:
    """Exchange the halves of each of the vectors that a modulation computes."""

    def exchange(value: Tensor) -> Tensor:
        vectors = value.reshape(-1, width, *value.shape[1:])
        return vectors.roll(width // 2, 1).reshape(value.shape)

    return exchange


def _check_positions(weights: Mapping[str, Tensor], network: Transformer) -> None:
    """Refuse a position embedding that is not the sinusoidal one. Raises ValueError."""
    if POSITIONS not in weights:
        return
    width, side = len(network.first.bias), network.image_shape[1] // network.patch
    expected = sinusoidal_positions(side, width).roll(width // 2, 1)[None]
    value = weights[POSITIONS]
    if value.shape != expected.shape:
        raise ValueError(f"{POSITIONS} is {list(value.shape)}, and this network needs {list(expected.shape)}")
    if (difference := float((value.float() - expected).abs().max())) > 1e-4:
        raise ValueError(f"{POSITIONS} differs from the sinusoidal embedding by {difference:.2g}")
