"""Class-conditional (classifier-free) guidance of a velocity (Ho and Salimans 2022)."""

from dataclasses import dataclass

from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.objectives import Objective
from fm_core.method.types import Network, Velocity


@dataclass(frozen=True)
class Guided:
    """u_guided = u(x | no label) + scale (u(x | label) - u(x | no label)).

    Every objective's velocity is affine in its prediction, so guiding the velocity is guiding the score, the
    noise or the data by the same scale.
    """

    conditional: Velocity
    unconditional: Velocity
    scale: float
    forwards: int = 2  # of the network, for each image and call

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The guided velocity at t, scalar or [N], and x [N, ...]."""
        unconditional = self.unconditional(t, x)
        return unconditional + self.scale * (self.conditional(t, x) - unconditional)


def guided_velocity(
    objective: Objective,
    network: Network,
    label: Tensor,
    scale: float,
    null_label: Tensor | None = None,
) -> Velocity:
    """The velocity of images of the given classes, with guidance.

    Args:
        objective: what the network was trained for.
        network: trained with labels, and without them for a part of the examples.
        label: int64 [N].
        scale: 1 is the plain conditional velocity, at one forward a call; more trades diversity for fidelity.
        null_label: what the network takes for no label: None, or int64 [N].

    Raises:
        UserError: the scale is negative.
    """
    if scale < 0:
        raise UserError(f"the guidance scale must not be negative; 1 is no guidance; not {scale}")
    if scale == 1:
        return objective.velocity(network, label)
    return Guided(objective.velocity(network, label), objective.velocity(network, null_label), scale)
