"""Conditional means of data and noise, computed from a velocity on an affine path.

On x_t = alpha_t x1 + sigma_t x0 the velocity is u = alpha' E[x1 | x_t] + sigma' E[x0 | x_t], so that

    E[x1 | x_t] = (sigma u - sigma' x) / delta,   E[x0 | x_t] = (alpha' x - alpha u) / delta,
    delta = alpha' sigma - alpha sigma' = alpha sigma d/dt log(alpha / sigma),

for every type of prediction. There is no division by alpha or sigma, which vanish at the ends. A guided
velocity is affine in the prediction too, so its means are those of the guided prediction.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.paths import Path
from fm_core.method.types import Velocity

SMALLEST_DELTA = 1e-12


def round_time(t: float, dtype: torch.dtype) -> float:
    """Round t to the dtype of the state, as the network receives it."""
    return float(torch.tensor(t, dtype=dtype))


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of a path at one time, in float64."""

    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float

    @classmethod
    def at(cls, path: Path, t: float) -> "Coefficients":
        """The coefficients of a path at t."""
        time = torch.tensor([t], dtype=torch.float64)
        functions = (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
        return cls(*(float(function(time)) for function in functions))

    @property
    def delta(self) -> float:
        """The difference alpha' sigma - alpha sigma', positive where log-SNR increases."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma

    @property
    def half_log_snr(self) -> float:
        """Half of the log-SNR, log(alpha / sigma); infinite where one of the two is 0."""
        if self.alpha <= 0 or self.sigma <= 0:
            return -math.inf if self.alpha <= 0 else math.inf
        return math.log(self.alpha) - math.log(self.sigma)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a velocity, with the conditional means that it determines."""

    x: Tensor  # [N, ...]
    velocity: Tensor  # [N, ...]
    at: Coefficients

    @property
    def data(self) -> Tensor:
        """E[x1 | x_t], [N, ...]."""
        at = self.at
        return self._combine(-at.d_sigma / at.delta, at.sigma / at.delta)

    @property
    def noise(self) -> Tensor:
        """E[x0 | x_t], [N, ...]; minus sigma_t times the score if x0 and x1 are independent."""
        at = self.at
        return self._combine(at.d_alpha / at.delta, -at.alpha / at.delta)

    def euler(self, to: Coefficients) -> Tensor:
        """One Euler step in the x1 form, alpha E[x1 | x_t] + sigma E[x0 | x_t] with alpha and sigma of `to`.

        This is the DDIM step; on the OT path it equals the step of Euler's method.
        """
        at = self.at
        return self._combine(
            (to.sigma * at.d_alpha - to.alpha * at.d_sigma) / at.delta,
            (to.alpha * at.sigma - to.sigma * at.alpha) / at.delta,
        )

    def _combine(self, of_x: float, of_velocity: float) -> Tensor:
        return torch.add(self.x * of_x, self.velocity, alpha=of_velocity)


def coefficients_of_means(path: Path, t: float) -> Coefficients:
    """Return a path's coefficients at t, provided that the velocity determines the conditional means there.

    Raises:
        UserError: log-SNR does not increase at t.
    """
    at = Coefficients.at(path, t)
    if at.delta > SMALLEST_DELTA:
        return at
    raise UserError(
        f"the log-SNR of the path {path.name or type(path).__name__} does not increase at t = {t:g}, where "
        "its velocity does not determine x1; use a solver of torchdiffeq, such as midpoint, on a uniform grid"
    )


class Denoiser:
    """Evaluations of a velocity on a path.

    Args:
        velocity: u(t, x), the velocity of an objective on the path.
        path: the path.
    """

    def __init__(self, velocity: Velocity, path: Path) -> None:
        self.path = path
        self._velocity = velocity

    def __call__(self, t: float, x: Tensor) -> Evaluation:
        """Evaluate the velocity at t and x [N, ...]; raises UserError as `coefficients_of_means`."""
        at = coefficients_of_means(self.path, t)
        return Evaluation(x, self._velocity(torch.tensor(t, dtype=x.dtype, device=x.device), x), at)
