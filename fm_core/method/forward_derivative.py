"""Derivative of a network with two times along a trajectory, by forward-mode differentiation."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fm_core.method.types import Network


def derivative_along(
    network: Network, t: Tensor, s: Tensor, x: Tensor, direction: Tensor, label: Tensor | None
) -> Tensor:
    """Derivative of u(t, s, x) along dt = 1, dx = direction with s fixed: [N, ...], in the dtype of x.

    One Jacobian-vector product, without memory for a backward pass. Attention and group normalization are
    computed by their definitions: fused attention has no forward-mode derivative, and that of torch's group
    normalization does not accept channels-last images.

    Args:
        network: network(t, x, label, s), a module's forward function or composed of torch operations.
        t: [N].
        s: [N].
        x: [N, ...].
        direction: [N, ...].
        label: int64 [N] or None.
    """

    def average(t: Tensor, x: Tensor) -> Tensor:
        return network(t, x, label, s)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _GroupNormByDefinition():
        _, derivative = cast(
            tuple[Tensor, Tensor], torch.func.jvp(average, (t, x), (torch.ones_like(t), direction))
        )
    return derivative.to(x.dtype)


class _GroupNormByDefinition(TorchFunctionMode):
    """Computes torch.nn.functional.group_norm by its definition."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = group_norm if func is F.group_norm else func
        return function(*args, **(kwargs or {}))


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """torch.nn.functional.group_norm of x [N, C, ...], composed of operations on views of x."""
    parts = x.unflatten(1, (groups, -1))
    dims = tuple(range(2, parts.dim()))
    variance, mean = torch.var_mean(parts, dims, correction=0, keepdim=True)
    y = ((parts - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)
