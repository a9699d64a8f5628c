"""The divergence div u = sum_i du_i / dx_i of a velocity: exact, or by Hutchinson's estimator.

Both return one column per probe, [N, P], so that the variance over probes can be reported. For the exact
divergence P = 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.method.types import Velocity


class Divergence(ABC):
    """Base class: computes div u along with u."""

    @property
    @abstractmethod
    def probe_count(self) -> int:
        """P, the number of columns of the result."""

    @abstractmethod
    def compute(self, u: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """Divergence [N, P] of u [N, ...], which was computed from x [N, ...] under autograd."""

    def with_velocity(self, velocity: Velocity, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (u [N, ...], div u [N, P]) at a scalar t and x [N, ...], with one call of the velocity.

        Differentiable where gradients are enabled, detached where they are not.
        """
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if not (create_graph and x.requires_grad):
                x = x.detach().requires_grad_()
            u = velocity(t, x)
            divergence = self.compute(u, x, create_graph)
        return (u, divergence) if create_graph else (u.detach(), divergence.detach())


@dataclass(frozen=True)
class Exact(Divergence):
    """The exact trace of the Jacobian, by one backward pass per dimension; for few dimensions only."""

    @property
    def probe_count(self) -> int:
        """Always 1."""
        return 1

    def compute(self, u: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """The sum of du_i / dx_i, [N, 1]."""
        if not u.requires_grad:  # a velocity that does not depend on x
            return x.new_zeros(x.shape[0], 1)
        flat = u.flatten(1)
        trace = x.new_zeros(x.shape[0])
        for i in range(flat.shape[1]):
            # Always retain the graph: the next i needs it and, with create_graph, the caller differentiates
            # again.
            (row,) = torch.autograd.grad(
                flat[:, i].sum(), x, create_graph=create_graph, retain_graph=True, materialize_grads=True
            )
            trace = trace + row.flatten(1)[:, i]
        return trace[:, None]


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """Hutchinson's estimator E_z[z . (du/dx) z], eq. 34, with probes fixed for the entire solve.

    Redrawing the probes at each call would make the field noisy and force adaptive solvers into tiny steps.

    Args:
        probes: [P, N, ...], entries of mean 0 and variance 1; Rademacher probes have the least variance.
    """

    probes: Tensor

    @property
    def probe_count(self) -> int:
        """The number of probes."""
        return self.probes.shape[0]

    def compute(self, u: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """The products z . (du/dx) z, [N, P], by one backward pass per probe.

        Raises:
            ValueError: the probes are not of shape [P, *x.shape].
        """
        if self.probes.shape[1:] != x.shape:
            raise ValueError(
                f"probes must be [P, {', '.join(map(str, x.shape))}], not {list(self.probes.shape)}"
            )
        if not u.requires_grad:
            return x.new_zeros(x.shape[0], self.probe_count)
        estimates: list[Tensor] = []
        for i, z in enumerate(self.probes.to(x)):
            retain = create_graph or i + 1 < self.probe_count
            (product,) = torch.autograd.grad(
                u, x, z, create_graph=create_graph, retain_graph=retain, materialize_grads=True
            )
            estimates.append((product * z).flatten(1).sum(1))
        return torch.stack(estimates, dim=1)
