"""U-Net of Dhariwal & Nichol 2021 ("ADM"), the network of the paper's image experiments."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fm_core.models.blocks import Attention, Downsample, ResidualBlock, Upsample
from fm_core.models.layers import Conditioning, Conv2d, GroupNorm32, require_shape


class TimestepSequential(nn.Module):
    """Sequence of blocks, each called with the conditioning: (x, conditioning) -> x."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Apply every block."""
        for block in self.blocks:
            x = block(x, conditioning)
        return x


class UNet(nn.Module):
    """Network (velocity, score, noise or data prediction) for square images.

    ``network(t [N] float32 in [0, 1], x [N, image_channels, S, S], label int64 [N] or None)`` -> a tensor of
    the shape and dtype of x. An untrained network returns zeros. Weights may be bfloat16 with t and x
    float32.

    ``image_size``: side S of the images in pixels; each resolution below it is half as large.
    ``channels``: base width; ``channel_multipliers``: width of each resolution as a multiple of it.
    ``residual_blocks``: blocks per resolution in the encoder (one more in the decoder).
    ``attention_resolutions``: sides, in pixels, of the resolutions with attention (the middle always has it).
    ``head_channels``: channels per attention head. ``dropout``: probability, inside residual blocks.
    ``scale_shift``: the conditioning scales and shifts the normalized activation instead of being added.
    ``resample_with_residual_blocks``: resample inside residual blocks instead of with plain convolutions.
    ``classes``: number of classes, 0 for none; label ``classes`` (or None) is the null label.
    ``time_scale``: factor of t in the sinusoidal embedding.
    ``two_times``: a fourth argument, the second time s [N] in [0, 1], by default t.
    ``gradient_checkpointing``: recompute activations stage by stage in the backward pass of training.

    Raises:
        ValueError: the sizes are invalid (constructor), or `forward` gets images of another shape, or labels
            without having classes.
    """

    def __init__(
        self,
        image_size: int,
        image_channels: int,
        channels: int,
        channel_multipliers: Sequence[int],
        residual_blocks: int,
        attention_resolutions: Sequence[int],
        head_channels: int,
        dropout: float,
        scale_shift: bool,
        resample_with_residual_blocks: bool,
        classes: int = 0,
        time_scale: float = 1000.0,
        gradient_checkpointing: bool = False,
        two_times: bool = False,
    ) -> None:
        super().__init__()
        sides = resolutions(image_size, channel_multipliers, attention_resolutions)
        widths = [channels * multiplier for multiplier in channel_multipliers]
        self.image_shape = (image_channels, image_size, image_size)
        self.classes = classes
        self.gradient_checkpointing = gradient_checkpointing
        vector = 4 * channels
        self.conditioning = Conditioning(channels, vector, classes, time_scale, two_times)

        def residual(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, vector, dropout, scale_shift)

        def stage(inputs: int, outputs: int, side: int) -> list[nn.Module]:
            block: list[nn.Module] = [residual(inputs, outputs)]
            return [*block, Attention(outputs, head_channels)] if side in attention_resolutions else block

        def down(width: int) -> nn.Module:
            if resample_with_residual_blocks:
                return ResidualBlock(width, width, vector, dropout, scale_shift, "down")
            return Downsample(width)

        def up(width: int) -> nn.Module:
            if resample_with_residual_blocks:
                return ResidualBlock(width, width, vector, dropout, scale_shift, "up")
            return Upsample(width)

        self.first = Conv2d(image_channels, widths[0])
        self.down = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, (side, target) in enumerate(zip(sides, widths, strict=True)):
            for _ in range(residual_blocks):
                self.down.append(TimestepSequential(*stage(width, target, side)))
                width = target
                skips.append(width)
            if level < len(sides) - 1:
                self.down.append(TimestepSequential(down(width)))
                skips.append(width)

        self.middle = TimestepSequential(
            residual(width, width), Attention(width, head_channels), residual(width, width)
        )

        self.up = nn.ModuleList()
        for level, (side, target) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            for index in range(residual_blocks + 1):
                blocks = stage(width + skips.pop(), target, side)
                width = target
                if index == residual_blocks and level > 0:
                    blocks.append(up(width))
                self.up.append(TimestepSequential(*blocks))

        self.last_norm = GroupNorm32(width)
        self.last = Conv2d(width, image_channels, zero=True)

    def forward(self, t: Tensor, x: Tensor, label: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """Evaluate the network at times t [N], and s [N] with two times, and images x [N, C, S, S]."""
        require_shape(x, self.image_shape)
        conditioning = self.conditioning(t, label, s)
        h = x.to(dtype=self.first.weight.dtype, memory_format=torch.channels_last)
        h = self.first(h)
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, conditioning)
            skips.append(h)
        h = self._run(self.middle, h, conditioning)
        for stage in self.up:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), conditioning)
        return self.last(self.last_norm(h, activate=True)).to(x.dtype)

    def _run(self, stage: nn.Module, x: Tensor, conditioning: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(stage, x, conditioning, use_reentrant=False))
        return stage(x, conditioning)


def resolutions(
    image_size: int, channel_multipliers: Sequence[int], attention_resolutions: Sequence[int]
) -> list[int]:
    """Image sizes, in pixels, of the resolutions of a U-Net, largest first.

    Raises:
        ValueError: the image size cannot be halved that many times, or `attention_resolutions` has another
            size.
    """
    if not channel_multipliers:
        raise ValueError("channel_multipliers is empty: a U-Net needs at least one resolution")
    halvings = len(channel_multipliers) - 1
    if image_size % 2**halvings != 0:
        raise ValueError(
            f"{len(channel_multipliers)} channel_multipliers halve the image {halvings} times: "
            f"image_size {image_size} must be a multiple of {2**halvings}"
        )
    sides = [image_size // 2**level for level in range(halvings + 1)]
    unknown = sorted(set(attention_resolutions) - set(sides))
    if unknown:
        raise ValueError(f"attention_resolutions {unknown} are not among the resolutions {sides}")
    return sides
