"""Affine path given as two functions of t, differentiated by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.paths import Path
from fm_core.method.types import Interval


class Affine(Path):
    """A path x_t = alpha(t) x1 + sigma(t) x0 from two arbitrary functions of t.

    Args:
        alpha: function of t, [N] -> [N], composed of torch operations.
        sigma: function of t, [N] -> [N], composed of torch operations.
        interval: (start, end) inside [0, 1] on which both functions and their derivatives are finite.
        source_std: standard deviation of the ODE's source; by default sigma at the interval's start.

    Raises:
        UserError: the interval is not increasing or not inside [0, 1].
    """

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        interval: Interval = (0.0, 1.0),
        source_std: float | None = None,
    ) -> None:
        if not 0 <= interval[0] < interval[1] <= 1:
            raise UserError(f"affine: the interval must lie in [0, 1] and increase, not {interval}")
        self._alpha, self._sigma, self._interval = alpha, sigma, interval
        start = torch.tensor(interval[0], dtype=torch.float64)
        self._source_std = float(sigma(start)) if source_std is None else source_std

    @property
    def interval(self) -> Interval:
        """The interval of t given to the constructor."""
        return self._interval

    @property
    def source_std(self) -> float:
        """The value given to the constructor, or sigma at the interval's start."""
        return self._source_std

    def alpha(self, t: Tensor) -> Tensor:
        """The function `alpha` given to the constructor."""
        return self._alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The function `sigma` given to the constructor."""
        return self._sigma(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha, by autograd."""
        return derivative(self._alpha, t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma, by autograd."""
        return derivative(self._sigma, t)


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """df/dt of an elementwise function at each t, detached; zero where the function is constant."""
    with torch.inference_mode(False), torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        value = function(t)
        if not value.requires_grad:
            return torch.zeros_like(t)
        return torch.autograd.grad(value.sum(), t)[0]
