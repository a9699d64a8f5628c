"""UNet blocks: residual block, attention, resampling. Each maps (x, conditioning) to x."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fm_core.models.layers import Conv2d, GroupNorm32, Linear

Resample = Literal["none", "down", "up"]


def resample(x: Tensor, mode: Resample) -> Tensor:
    """Halve (mean of 2x2 pixels), double (nearest) or keep the height and width of x [N, C, H, W]."""
    if mode == "down":
        return F.avg_pool2d(x, 2)
    if mode == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


class ResidualBlock(nn.Module):
    """Residual block: two normalized convolutions, conditioned between them, plus the input.

    (x [N, inputs, H, W], conditioning [N, conditioning]) -> [N, outputs, H', W'], with H' = H, H/2 or 2H. The
    second convolution is initialized to zero, so that the block starts as its (resampled, projected) input.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        conditioning: int,
        dropout: float,
        scale_shift: bool,
        resampling: Resample = "none",
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resampling: Resample = resampling
        self.dropout = dropout
        self.first_norm = GroupNorm32(inputs)
        self.first = Conv2d(inputs, outputs)
        self.condition = Linear(conditioning, 2 * outputs if scale_shift else outputs)
        self.second_norm = GroupNorm32(outputs)
        self.second = Conv2d(outputs, outputs, zero=True)
        self.skip = Conv2d(inputs, outputs, kernel=1) if inputs != outputs else None

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Apply the block."""
        h = resample(self.first_norm(x, activate=True), self.resampling)
        h = self.first(h)
        vector: Tensor = self.condition(F.silu(conditioning))
        if self.scale_shift:
            scale, shift = vector.chunk(2, dim=1)
            h = self.second_norm(h, scale, shift, activate=True)
        else:
            h = self.second_norm(h + vector[:, :, None, None].to(h.dtype), activate=True)
        h = self.second(F.dropout(h, self.dropout, self.training))
        x = resample(x, self.resampling)
        return h + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of x [N, channels, H, W], plus x; starts as the identity.

    Raises:
        ValueError: `head_channels` does not divide `channels`.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        if channels % head_channels != 0:
            raise ValueError(
                f"attention over {channels} channels cannot have heads of {head_channels} channels: "
                f"head_channels must divide {channels}"
            )
        self.head_channels = head_channels
        self.norm = GroupNorm32(channels)
        self.queries_keys_values = Linear(channels, 3 * channels)
        self.projection = Linear(channels, channels, zero=True)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Apply the block; `conditioning` is unused."""
        n, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, channels)
        heads = self.queries_keys_values(tokens).view(n, height * width, 3, -1, self.head_channels)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.projection(mixed.transpose(1, 2).reshape(n, height * width, channels))
        return x + mixed.view(n, height, width, channels).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Strided convolution: [N, channels, H, W] -> [N, channels, H/2, W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = Conv2d(channels, channels, stride=2)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Apply the block; `conditioning` is unused."""
        return self.convolution(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling and a convolution: [N, channels, H, W] -> [N, channels, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = Conv2d(channels, channels)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Apply the block; `conditioning` is unused."""
        return self.convolution(resample(x, "up"))
