"""Layers: channels-last convolution, float32 group normalization, time and label embedding.

Images are [N, C, H, W] in shape and channels-last in memory. Weights of convolutions are stored as
[out, height, width, in], so that contiguous storage *is* the channels-last layout and an optimizer that
flattens and repartitions parameters (ZeRO) preserves it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH_SCALE = 10.0
"""Factor of the length s - t in the embedding of the second time."""


class Conv2d(nn.Module):
    """Square convolution with "same" padding: [N, inputs, H, W] -> [N, outputs, H', W'].

    H' = ceil(H / stride). The weight has shape [outputs, kernel, kernel, inputs]; `zero` initializes
    weight and bias to zero.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, zero: bool = False
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = kernel // 2
        self.weight = nn.Parameter(torch.empty(outputs, kernel, kernel, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        bound = 0.0 if zero else 1.0 / math.sqrt(inputs * kernel * kernel)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, inputs, H, W]."""
        weight = self.weight.permute(0, 3, 1, 2)
        return F.conv2d(x, weight, self.bias, stride=self.stride, padding=self.padding)


class Linear(nn.Linear):
    """Linear layer; `zero` initializes weight and bias to zero."""

    def __init__(self, inputs: int, outputs: int, zero: bool = False) -> None:
        super().__init__(inputs, outputs)
        if zero:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def group_count(channels: int) -> int:
    """Number of normalization groups for `channels`.

    It is the largest divisor of `channels` that is at most 32 and leaves at least four channels per group
    (one group where that is impossible).
    """
    most = max(1, min(32, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class GroupNorm32(nn.Module):
    """Group normalization with optional scale, shift and SiLU, in float32 or better, in the dtype of x.

    Tensors in float64 remain so.

    In bfloat16, the statistics and the rounding between the operations of the affine step would reduce
    accuracy; the compiler fuses the float32 computation into a single kernel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = group_count(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, activate: bool = False
    ) -> Tensor:
        """Normalize x [N, C, H, W]; then y (1 + scale) + shift, both [N, C], if given; SiLU if `activate`."""
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        y = F.group_norm(at_least_float32(x), self.groups, weight, bias, eps=1e-5)
        if scale is not None and shift is not None:
            scale, shift = (at_least_float32(part)[:, :, None, None] for part in (scale, shift))
            y = torch.addcmul(shift, y, 1 + scale)
        if activate:
            y = F.silu(y)
        return y.to(x.dtype)


def require_shape(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless x is [N, *image_shape]."""
    if tuple(x.shape[1:]) != image_shape:
        raise ValueError(f"the network is for images {image_shape}, these are {tuple(x.shape[1:])}")


def timestep_embedding(t: Tensor, width: int, scale: float = 1000.0) -> Tensor:
    """Sinusoidal embedding of scale * t: [N] in [0, 1] -> [N, width], frequencies from 1 to 1e-4.

    The result is float64 if t is, else float32. With a scale of 1 the features are nearly constant over t in
    [0, 1].
    """
    half, t = width // 2, at_least_float32(t)
    exponents = torch.arange(half, dtype=t.dtype, device=t.device) / half
    angles = scale * t[:, None] * torch.exp(-math.log(10_000) * exponents)[None, :]
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    return F.pad(features, (0, width - 2 * half))


class SecondTimeEmbedding(nn.Module):
    """Embedding of the interval s - t between two times: [N] in [0, 1] -> [N, outputs].

    Initialized to zero, so that a network that is started from weights with one time ignores s at first. The
    frequencies are below those of the first time, because objectives differentiate the embedding.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.features = features
        self.inner = Linear(features, outputs)
        self.outer = Linear(outputs, outputs, zero=True)

    def forward(self, length: Tensor) -> Tensor:
        """Embed the lengths of the intervals."""
        features = timestep_embedding(length, self.features, LENGTH_SCALE).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(features)))


def is_second_time(name: str) -> bool:
    """Whether a parameter belongs to the embedding of the second time, by its name in a state dict."""
    return "second_time" in name.split(".")


class Conditioning(nn.Module):
    """Joint embedding of times and label: (t [N] in [0, 1], label int64 [N] or None, s) -> [N, outputs].

    With `classes` > 0 labels run from 0 to `classes`; label `classes`, or None, is the null label of
    classifier-free guidance. With `two_times` there is a second time s [N], by default t.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        classes: int = 0,
        time_scale: float = 1000.0,
        two_times: bool = False,
    ) -> None:
        super().__init__()
        self.features = features
        self.time_scale = time_scale
        self.classes = classes
        self.inner = Linear(features, outputs)
        self.outer = Linear(outputs, outputs)
        self.label = nn.Embedding(classes + 1, outputs) if classes > 0 else None
        self.second_time = SecondTimeEmbedding(features, outputs) if two_times else None

    def forward(self, t: Tensor, label: Tensor | None, s: Tensor | None = None) -> Tensor:
        """Embed t, label and s.

        Raises:
            ValueError: labels are given to a network without classes, or s to a network with one time.
        """
        dtype = self.inner.weight.dtype
        t = t if dtype == torch.float64 else t.float()
        features = timestep_embedding(t, self.features, self.time_scale).to(dtype)
        vector: Tensor = self.outer(F.silu(self.inner(features)))
        if self.second_time is not None:
            vector = vector + self.second_time(torch.zeros_like(t) if s is None else s - t)
        elif s is not None:
            raise ValueError("a second time was given to a network with one time: pass s=None")
        if self.label is None:
            if label is not None:
                raise ValueError("labels were given to a network without classes: pass label=None")
            return vector
        if label is None:
            label = torch.full(t.shape, self.classes, dtype=torch.int64, device=t.device)
        return vector + self.label(label)
