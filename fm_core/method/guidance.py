"""Classifier-free guidance of a velocity (Ho and Salimans 2022)."""

from dataclasses import dataclass

from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.objectives import Objective
from fm_core.method.types import Network, Velocity


@dataclass(frozen=True)
class GuidedVelocity:
    """Guided velocity u(x | no label) + scale (u(x | label) - u(x | no label)).

    The velocity of every objective is affine in its prediction, so guiding the velocity equals guiding the
    score, noise or data prediction with the same scale.
    """

    conditional: Velocity
    unconditional: Velocity
    scale: float
    forwards: int = 2  # network evaluations per image and call

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the guided velocity [N, ...] at t, scalar or [N], and x [N, ...]."""
        unconditional = self.unconditional(t, x)
        return unconditional + self.scale * (self.conditional(t, x) - unconditional)


def guided_velocity(
    objective: Objective,
    network: Network,
    label: Tensor,
    scale: float,
    null_label: Tensor | None = None,
) -> Velocity:
    """Class-conditional velocity with classifier-free guidance.

    Args:
        objective: the objective that the network was trained with.
        network: trained with label dropout: with labels, and for part of the examples without.
        label: int64 [N].
        scale: 1 is the plain conditional velocity, at one network evaluation per call; more trades diversity
            for fidelity.
        null_label: what the network expects in place of a label: None, or int64 [N].

    Raises:
        UserError: the scale is negative.
    """
    if scale < 0:
        raise UserError(f"the guidance scale must be at least 0 (1 is no guidance), not {scale}")
    if scale == 1:
        return objective.velocity(network, label)
    return GuidedVelocity(objective.velocity(network, label), objective.velocity(network, null_label), scale)
