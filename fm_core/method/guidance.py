"""Guidance of a velocity: classifier-free, or by a weaker model, for all t or in an interval.

Ho and Salimans (2022); Karras et al. (2024), "Guiding a Diffusion Model with a Bad Version of Itself";
Kynkäänniemi et al. (2024), "Applying Guidance in a Limited Interval".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.objectives import Objective
from fm_core.method.types import Evaluations, Interval, Network, Velocity


@dataclass(frozen=True)
class GuidedVelocity:
    """Guided velocity weaker + scale (conditional - weaker) for t in the interval, conditional elsewhere.

    The velocity of every objective is affine in its prediction, so guiding the velocity equals guiding the
    score, noise or data prediction with the same scale.

    Args:
        conditional: the velocity that is guided.
        weaker: the velocity of the same network without label, or of a weaker model on the same path.
        scale: the guidance scale; 1 gives the conditional velocity up to rounding.
        interval: (low, high), closed, with both ends rounded to the precision of x. None guides everywhere.
        second_network: whether `weaker` uses another network, whose evaluations are counted separately.

    Raises:
        UserError: the scale is negative, or the interval does not increase.
    """

    conditional: Velocity
    weaker: Velocity
    scale: float
    interval: Interval | None = None
    second_network: bool = False
    forwards: int = 2  # network evaluations per image and call inside the interval

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise UserError(f"the guidance scale must be at least 0 (1 is no guidance), not {self.scale}")
        if self.interval and not self.interval[0] < self.interval[1]:
            raise UserError(f"the guidance interval must increase, not {list(self.interval)}")

    @property
    def jumps(self) -> tuple[float, ...]:
        """Times at which the velocity is not continuous."""
        return self.interval or ()

    def evaluations_at(self, t: Tensor, dtype: torch.dtype) -> Evaluations:
        """Evaluations per image of the network and of the second network, at t and for x of this dtype."""
        if self.interval is not None and not bool(self._guided(t, dtype, self.interval).any()):
            return 1, 0
        return (1, 1) if self.second_network else (2, 0)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the guided velocity [N, ...] at t, scalar or [N], and x [N, ...]."""
        if self.interval is None:
            return self._combined(t, x)[0]
        guided = self._guided(t, x.dtype, self.interval)
        if not bool(guided.any()):
            return self.conditional(t, x)
        combined, conditional = self._combined(t, x)
        if bool(guided.all()):
            return combined
        return torch.where(guided.view(-1, *[1] * (x.dim() - 1)), combined, conditional)

    def _combined(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The guided and the conditional velocity."""
        weaker = self.weaker(t, x)
        conditional = self.conditional(t, x)
        return weaker + self.scale * (conditional - weaker), conditional

    @staticmethod
    def _guided(t: Tensor, dtype: torch.dtype, interval: Interval) -> Tensor:
        """Whether t is in the interval, bool like t; the ends are rounded like the solver's times."""
        t = t.to(dtype)
        low, high = torch.tensor(interval, dtype=dtype, device=t.device)
        return (low <= t) & (t <= high)


def guided_velocity(
    objective: Objective,
    network: Network,
    label: Tensor,
    scale: float,
    null_label: Tensor | None = None,
    interval: Interval | None = None,
) -> Velocity:
    """Class-conditional velocity with classifier-free guidance.

    Args:
        objective: the objective that the network was trained with.
        network: a network trained with label dropout, that is, without labels for part of the examples.
        label: int64 [N].
        scale: 1 gives the conditional velocity, at one network evaluation per call; larger values trade
            diversity for fidelity.
        null_label: what the network expects in place of a label: None, or int64 [N].
        interval: the interval of t in which to guide, as in `GuidedVelocity`.

    Raises:
        UserError: the scale is negative, or the interval does not increase.
    """
    conditional = objective.velocity(network, label)
    if scale == 1:
        return conditional
    return GuidedVelocity(conditional, objective.velocity(network, null_label), scale, interval)


def autoguided_velocity(
    conditional: Velocity, weaker: Velocity, scale: float, interval: Interval | None = None
) -> Velocity:
    """Velocity guided by a weaker model on the same path (Karras et al. 2024).

    Args:
        conditional: the velocity of the model; scale 1 returns it unchanged.
        weaker: the velocity of the weaker model, with the same labels; its objective may differ.
        scale: the guidance scale.
        interval: the interval of t in which to guide, as in `GuidedVelocity`.

    Raises:
        UserError: the scale is negative, or the interval does not increase.
    """
    if scale == 1:
        return conditional
    return GuidedVelocity(conditional, weaker, scale, interval, second_network=True)
