"""Conversion between uint8 pixels and model inputs: scaling, dequantization, quantization, bits/dim offset.

All four must agree, so one class implements them. A pixel k in 0 .. levels-1 corresponds to the bin
[2 k / levels - 1, 2 (k + 1) / levels - 1) of [-1, 1). For 256 levels this is the paper's map
x = 2^-7 (k + u) - 1 with its offset of 7 bits (eqs. 36 and 37). Training on k / 127.5 - 1 and evaluating with
this map would shift the data by up to half a bin.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.errors import UserError


@dataclass(frozen=True)
class Quantizer:
    """The map between intensity levels and the range [-1, 1) of the model.

    Args:
        levels: number of intensity levels, 2 to 256 (256 for photographs, 17 for scikit-learn's digits).

    Raises:
        UserError: levels is out of range.
    """

    levels: int = 256

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise UserError(f"levels must lie in 2 .. 256, not {self.levels}")

    @property
    def bits_offset(self) -> float:
        """log2(levels / 2): bits/dim of the pixels = -log2 p(x) / d + bits_offset."""
        return math.log2(self.levels / 2)

    def scale(self, pixels: Tensor) -> Tensor:
        """Bin centers 2 (k + 1/2) / levels - 1, float32, of uint8 pixels of any shape."""
        return 2 * (self._as_float(pixels) + 0.5) / self.levels - 1

    def dequantize(self, pixels: Tensor, u: Tensor) -> Tensor:
        """Uniform dequantization 2 (k + u) / levels - 1, float32.

        Args:
            pixels: uint8, any shape.
            u: uniform in [0, 1), the same shape.
        """
        # Round u to the middle of one of 2^15 intervals, so that k + u is exact in float32 (255.99999999
        # is not) and quantize() always returns the original pixel.
        u = (torch.floor(u.to(torch.float32) * 2**15) + 0.5) / 2**15
        return 2 * (self._as_float(pixels) + u) / self.levels - 1

    def quantize(self, x: Tensor) -> Tensor:
        """The pixel whose bin contains x, uint8: floor((x + 1) levels / 2), clamped to 0 .. levels-1.

        Raises:
            ValueError: x contains a NaN, which would otherwise become a pixel.
        """
        if torch.isnan(x).any():
            raise ValueError("cannot quantize an image with NaNs")
        pixels = torch.floor((x.to(torch.promote_types(x.dtype, torch.float32)) + 1) * (self.levels / 2))
        return pixels.clamp(0, self.levels - 1).to(torch.uint8)

    def _as_float(self, pixels: Tensor) -> Tensor:
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8, not {pixels.dtype}")
        return pixels.to(torch.float32)
