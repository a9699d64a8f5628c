"""The divergence div u = sum_i du_i / dx_i of a velocity, exactly or by Hutchinson's estimator.

Both give one column a probe, [N, P], so that the scatter over probes can be reported; exactly, P = 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.method.types import Velocity


class Divergence(ABC):
    """A way of computing div u along with u."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """P."""

    @abstractmethod
    def of(self, u: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """Div u, [N, P], of u [N, ...] computed from x [N, ...] by autograd."""

    def with_velocity(self, velocity: Velocity, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(u [N, ...], div u [N, P]) at t scalar and x [N, ...], by one call of the velocity.

        Differentiable where gradients are enabled, detached where they are not.
        """
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if not (create_graph and x.requires_grad):
                x = x.detach().requires_grad_()
            u = velocity(t, x)
            divergence = self.of(u, x, create_graph)
        return (u, divergence) if create_graph else (u.detach(), divergence.detach())


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace of the Jacobian, one backward pass a dimension: for small dimensions."""

    @property
    def columns(self) -> int:
        """1."""
        return 1

    def of(self, u: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """sum_i du_i / dx_i."""
        if not u.requires_grad:  # a velocity that does not depend on x
            return x.new_zeros(x.shape[0], 1)
        flat = u.flatten(1)
        trace = x.new_zeros(x.shape[0])
        for i in range(flat.shape[1]):
            # Always retained: with create_graph the caller differentiates again, without it the next i does.
            (row,) = torch.autograd.grad(
                flat[:, i].sum(), x, create_graph=create_graph, retain_graph=True, materialize_grads=True
            )
            trace = trace + row.flatten(1)[:, i]
        return trace[:, None]


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """E_z[z . (du/dx) z], eq. 34, with probes that are drawn once and kept for the whole solve.

    A probe redrawn at each call makes the field noisy, and an adaptive solver then crawls.

    Args:
        probes: [P, N, ...] with entries of mean 0 and variance 1, Rademacher for the least variance.
    """

    probes: Tensor

    @property
    def columns(self) -> int:
        """The number of probes."""
        return self.probes.shape[0]

    def of(self, u: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """The product z . (du/dx) z for each probe, by one backward pass each.

        Raises:
            ValueError: the probes do not have the shape [P, *x.shape].
        """
        if self.probes.shape[1:] != x.shape:
            raise ValueError(
                f"probes must be [P, {', '.join(map(str, x.shape))}], not {list(self.probes.shape)}"
            )
        if not u.requires_grad:
            return x.new_zeros(x.shape[0], self.columns)
        estimates: list[Tensor] = []
        for i, z in enumerate(self.probes.to(x)):
            retain = create_graph or i + 1 < self.columns
            (product,) = torch.autograd.grad(
                u, x, z, create_graph=create_graph, retain_graph=retain, materialize_grads=True
            )
            estimates.append((product * z).flatten(1).sum(1))
        return torch.stack(estimates, dim=1)
