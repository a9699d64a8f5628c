"""Diffusion transformer ("DiT", Peebles & Xie 2023; also the network of SiT), on pixels."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fm_core.models.layers import Conditioning, Linear, at_least_float32, require_shape

TIME_FEATURES = 256
"""Width of the sinusoidal time embedding, independent of the transformer's width."""


class AdaLNModulation(nn.Module):
    """Modulation of adaLN-zero: conditioning [N, width] -> `count` of [N, 1, width], initially zero."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.dense = Linear(width, count * width, zero=True)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Compute the vectors."""
        vector: Tensor = self.dense(F.silu(conditioning))
        return vector[:, None, :].chunk(self.count, dim=2)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of tokens x [N, T, width], times 1 + scale, plus shift; in float32 or better, dtype of x."""
    y = F.layer_norm(at_least_float32(x), x.shape[-1:], eps=1e-6)
    return torch.addcmul(at_least_float32(shift), y, 1 + at_least_float32(scale)).to(x.dtype)


class TransformerBlock(nn.Module):
    """Transformer block: attention and MLP, each modulated and gated by the conditioning (adaLN-zero).

    (x [N, T, width], conditioning [N, width]) -> [N, T, width]. Initialized to the identity.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = AdaLNModulation(width, 6)
        self.queries_keys_values = Linear(width, 3 * width)
        self.projection = Linear(width, width)
        self.inner = Linear(width, 4 * width)
        self.outer = Linear(4 * width, width)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Apply the block."""
        shift, scale, gate, inner_shift, inner_scale, inner_gate = self.modulation(conditioning)
        x = x + gate * self._attend(modulated_layer_norm(x, shift, scale))
        hidden: Tensor = self.inner(modulated_layer_norm(x, inner_shift, inner_scale))
        return x + inner_gate * self.outer(F.gelu(hidden, approximate="tanh"))

    def _attend(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        parts = self.queries_keys_values(x).view(n, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.projection(mixed.transpose(1, 2).reshape(n, tokens, width))


class Transformer(nn.Module):
    """Network (velocity, score, noise or data prediction) for square images, with the interface of the UNet.

    ``network(t [N] float32 in [0, 1], x [N, image_channels, S, S], label int64 [N] or None)`` -> a tensor of
    the shape and dtype of x. An untrained network returns zeros. Weights may be bfloat16 with t and x
    float32.

    ``patch``: side of a patch in pixels; the image becomes (S / patch)^2 tokens of ``width`` channels.
    ``depth``: number of blocks. ``heads``: attention heads per block. ``classes``: 0 for none; label
    ``classes`` (or None) is the null label. ``time_scale``: factor of t in the sinusoidal embedding.
    ``two_times``: a fourth argument, the second time s [N] in [0, 1], by default t.
    ``gradient_checkpointing``: recompute activations block by block in the backward pass of training.

    Raises:
        ValueError: the sizes are invalid (constructor), or `forward` gets images of another shape, or labels
            without having classes.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: int,
        image_channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int = 0,
        time_scale: float = 1000.0,
        gradient_checkpointing: bool = False,
        two_times: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patch {patch} does not divide the image size {image_size}")
        if width % 4 or width % heads:
            raise ValueError(f"width {width} must be a multiple of 4 and of heads = {heads}")
        self.image_shape = (image_channels, image_size, image_size)
        self.classes = classes
        self.patch = patch
        self.heads = heads
        self.gradient_checkpointing = gradient_checkpointing
        self.first = Linear(patch * patch * image_channels, width)
        self.conditioning = Conditioning(TIME_FEATURES, width, classes, time_scale, two_times)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.last_modulation = AdaLNModulation(width, 2)
        self.last = Linear(width, patch * patch * image_channels, zero=True)
        # Not persistent, because it is a function of the sizes.
        self.register_buffer("positions", sinusoidal_positions(image_size // patch, width), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier weights and zero biases, except for layers initialized to zero.

        Biases of the time embedding keep torch's uniform distribution; those of DiT are zero.
        """
        for block in self.blocks:
            for layer in block.children():
                if isinstance(layer, Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.first.weight)
        nn.init.zeros_(self.first.bias)
        for layer in (self.conditioning.inner, self.conditioning.outer, self.conditioning.label):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Tensor, x: Tensor, label: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """Evaluate the network at times t [N], and s [N] with two times, and images x [N, C, S, S]."""
        require_shape(x, self.image_shape)
        conditioning = self.conditioning(t, label, s)
        tokens: Tensor = self.first(to_patches(x, self.patch).to(self.first.weight.dtype))
        tokens = tokens + self.positions.to(tokens.dtype)
        for block in self.blocks:
            tokens = self._run(block, tokens, conditioning)
        shift, scale = self.last_modulation(conditioning)
        patches: Tensor = self.last(modulated_layer_norm(tokens, shift, scale))
        return from_patches(patches, self.patch, self.image_shape).to(x.dtype)

    def _run(self, block: nn.Module, x: Tensor, conditioning: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, x, conditioning, use_reentrant=False))
        return block(x, conditioning)


def to_patches(x: Tensor, patch: int) -> Tensor:
    """Cut images [N, C, S, S] into tokens [N, (S / patch)^2, patch * patch * C], row by row."""
    n, channels, size, _ = x.shape
    side = size // patch
    grid = x.reshape(n, channels, side, patch, side, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, side * side, patch * patch * channels)


def from_patches(tokens: Tensor, patch: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Inverse of `to_patches`."""
    channels, size, _ = image_shape
    side = size // patch
    grid = tokens.reshape(len(tokens), side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), channels, size, size)


def sinusoidal_positions(side: int, width: int) -> Tensor:
    """Sinusoidal position embedding of row and column: float32 [side^2, width]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies[None, :]
    features = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    rows = features[:, None, :].expand(side, side, width // 2)
    columns = features[None, :, :].expand(side, side, width // 2)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)
