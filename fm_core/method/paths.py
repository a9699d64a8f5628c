"""Probability paths between noise and data.

t = 0 is noise (x0) and t = 1 is data (x1); a path is the pair (alpha_t, sigma_t) in

    x_t = alpha_t x1 + sigma_t x0,   x0 ~ N(0, I),   u_t(x_t | x1) = alpha'_t x1 + sigma'_t x0.

Equation numbers are those of Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747). The
paper writes mu_t(x1) = alpha_t x1 (its eq. 10) and gives the velocity in Theorem 3 (eq. 15); on the path,
where x0 = (x - mu_t) / sigma_t, it equals the form above, which needs no division.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.discrete_steps import discrete_coefficients, polynomial
from fm_core.method.time_pairs import SecondTimes
from fm_core.method.types import Interval


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Reshape t, [N] or [], to broadcast against x, [N, ...].

    Raises:
        TypeError: t is not float32 or float64: bfloat16 has a resolution of about 1e-2 near t = 1.
    """
    if not t.is_floating_point() or torch.finfo(t.dtype).bits < 32:
        raise TypeError(f"time must be float32 or float64, not {t.dtype}")
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


@dataclass(frozen=True)
class PathSample:
    """Points on a path, with the quantities that training losses need."""

    x_t: Tensor  # [N, ...], float32 or better: alpha_t x1 + sigma_t x0
    velocity: Tensor  # [N, ...]: the conditional velocity u_t(x_t | x1), the target of eq. 14
    x0: Tensor  # [N, ...]: standard normal noise
    x1: Tensor  # [N, ...]: data
    t: Tensor  # [N]
    second: SecondTimes | None = None  # the second times, for objectives that need them


class Path(ABC):
    """Base class of paths: alpha_t, sigma_t and their derivatives determine everything else.

    A new path subclasses this class and defines these four methods; `name` identifies it in configuration
    files.
    """

    name: ClassVar[str] = ""

    @property
    def interval(self) -> Interval:
        """The range of t over which the path is trained, sampled and integrated."""
        return (0.0, 1.0)

    @property
    def source_std(self) -> float:
        """Standard deviation of the ODE's source; x0 in x_t is standard normal on every path."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t, in the shape and dtype of t; increases with t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t, in the shape and dtype of t; decreases with t."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha_t, in the shape and dtype of t."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma_t, in the shape and dtype of t."""

    def diffusion(self, t: Tensor) -> Tensor:
        """g_t^2 of the diffusion with these marginals: 2 (sigma_t^2 alpha'_t / alpha_t - sigma_t sigma'_t).

        VP: beta(1 - t). VE: -d sigma_t^2 / dt. Infinite where alpha_t = 0.
        """
        sigma = self.sigma(t)
        return 2 * (sigma**2 * self.d_alpha(t) / self.alpha(t) - sigma * self.d_sigma(t))

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> PathSample:
        """The point x_t and its conditional velocity (eq. 11 and, for OT, eqs. 22 and 23).

        Args:
            x0: standard normal noise [N, ...].
            x1: data [N, ...], the shape of x0.
            t: times [N], float32 or float64; the arithmetic is in this dtype or a more precise one.

        Raises:
            TypeError: t is not float32 or float64.
            ValueError: the shapes do not match.
        """
        if x0.shape != x1.shape or t.shape != x1.shape[:1]:
            raise ValueError(f"need x0 and x1 [N, ...] and t [N], not {x0.shape}, {x1.shape} and {t.shape}")
        dtype = torch.promote_types(t.dtype, x1.dtype)
        x0, x1 = x0.to(dtype), x1.to(dtype)
        alpha, sigma = expand_like(self.alpha(t), x1), expand_like(self.sigma(t), x1)
        d_alpha, d_sigma = expand_like(self.d_alpha(t), x1), expand_like(self.d_sigma(t), x1)
        return PathSample(
            x_t=alpha * x1 + sigma * x0, velocity=d_alpha * x1 + d_sigma * x0, x0=x0, x1=x1, t=t
        )


@dataclass(frozen=True)
class OptimalTransport(Path):
    """Optimal-transport path, eq. 20: alpha_t = t, sigma_t = 1 - (1 - sigma_min) t.

    The paper gives no value for sigma_min; 1e-5 is this project's choice, far below an intensity level
    (8e-3). The velocity is eq. 23, x1 - (1 - sigma_min) x0; eq. 21 divides by sigma_t and loses float32
    precision near t = 1.
    """

    name: ClassVar[str] = "optimal-transport"
    sigma_min: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise UserError(f"optimal-transport: sigma_min must lie in [0, 1), not {self.sigma_min}")

    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient alpha_t = t of the data."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = 1 - (1 - sigma_min) t, evaluated so that t = 1 gives sigma_min exactly."""
        return (1 - t) + self.sigma_min * t

    def d_alpha(self, t: Tensor) -> Tensor:
        """alpha'_t = 1."""
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """sigma'_t = -(1 - sigma_min)."""
        return torch.full_like(t, self.sigma_min - 1)


@dataclass(frozen=True)
class VariancePreserving(Path):
    """Variance-preserving diffusion path, eq. 18: alpha_t = exp(-T(1 - t) / 2), sigma_t^2 = 1 - alpha_t^2.

    T(s) = s beta_min + s^2 (beta_max - beta_min) / 2 and beta(s) = T'(s) (the paper's App. E.1). sigma'_t is
    infinite at t = 1, so the interval ends at 1 - epsilon in training, sampling and likelihood.

    With ``steps`` = N > 0 the marginals are those of DDPM with N steps, whose betas increase linearly from
    beta_min / N to beta_max / N: at t = 1 - n / N, alpha_t^2 is the product of 1 - beta_j over its first n
    steps. T is then the polynomial through these values (`discrete_coefficients`). The interval ends at the
    first of these steps, 1 - 1 / N; closer to the data, DDPM's networks are not trained.

    The ODE starts from N(0, I) although alpha_0 = 0.0066; for data of magnitude 1 the mismatch is at most
    2e-5 nats per dimension on average, and about 2e-3 in the worst case.
    """

    name: ClassVar[str] = "variance-preserving"
    beta_min: float = 0.1
    beta_max: float = 20.0
    epsilon: float = 1e-5
    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps and not 0 < self.beta_max < self.steps / 10:
            raise UserError(
                f"variance-preserving: steps {self.steps} must be 0 or more than 10 beta_max = "
                f"{10 * self.beta_max:g}; DDPM has 1000"
            )
        if not 0 < self.beta_min <= self.beta_max:
            raise UserError(
                f"variance-preserving: need 0 < beta_min <= beta_max, not {self.beta_min}, {self.beta_max}"
            )
        if self.steps and self.epsilon != type(self).epsilon:
            raise UserError(
                f"variance-preserving: epsilon does nothing with steps {self.steps}, whose interval ends at "
                "1 - 1 / steps; remove it"
            )
        if not 0 < self.epsilon < 1:
            raise UserError(f"variance-preserving: epsilon must lie in (0, 1), not {self.epsilon}")

    @property
    def interval(self) -> Interval:
        """The interval (0, 1 - epsilon), or (0, 1 - 1 / steps)."""
        return (0.0, 1.0 - (1 / self.steps if self.steps else self.epsilon))

    def beta(self, t: Tensor) -> Tensor:
        """Noise rate T'(s), the paper's beta, at s = 1 - t."""
        if self.steps:
            coefficients = discrete_coefficients(self.beta_min, self.beta_max, self.steps)
            return polynomial(1 - t, [power * c for power, c in enumerate(coefficients, 1)])
        return self.beta_min + (1 - t) * (self.beta_max - self.beta_min)

    def integrated_beta(self, t: Tensor) -> Tensor:
        """T(1 - t)."""
        s = 1 - t
        if self.steps:
            return s * polynomial(s, discrete_coefficients(self.beta_min, self.beta_max, self.steps))
        return s * self.beta_min + 0.5 * s**2 * (self.beta_max - self.beta_min)

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = exp(-T(1 - t) / 2)."""
        return torch.exp(-0.5 * self.integrated_beta(t))

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = sqrt(1 - exp(-T)), by expm1: in float32, 1 - exp(-1e-6) has only one correct digit."""
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        """alpha'_t = beta alpha / 2."""
        return 0.5 * self.beta(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """sigma'_t = -beta alpha^2 / (2 sigma), because sigma^2 + alpha^2 = 1."""
        return -0.5 * self.beta(t) * self.alpha(t) ** 2 / self.sigma(t)


@dataclass(frozen=True)
class VarianceExploding(Path):
    """Variance-exploding diffusion path, eq. 16: alpha_t = 1, sigma_t = sigma_min^t sigma_max^(1 - t).

    The geometric schedule and its two constants are those of Song et al. 2021; the paper trains no VE path.
    The ODE starts from N(0, sigma_max^2 I) instead of its convolution with the data distribution.
    """

    name: ClassVar[str] = "variance-exploding"
    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"variance-exploding: need 0 < sigma_min < sigma_max, not {self.sigma_min}, {self.sigma_max}"
            )

    @property
    def source_std(self) -> float:
        """Equal to sigma_max."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = 1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = sigma_min (sigma_max / sigma_min)^(1 - t)."""
        return self.sigma_min * torch.exp((1 - t) * math.log(self.sigma_max / self.sigma_min))

    def d_alpha(self, t: Tensor) -> Tensor:
        """alpha'_t = 0."""
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """sigma'_t = -sigma_t log(sigma_max / sigma_min)."""
        return -math.log(self.sigma_max / self.sigma_min) * self.sigma(t)


@dataclass(frozen=True)
class Cosine(Path):
    """Cosine path ("GVP"): alpha_t = sin(pi t / 2), sigma_t = cos(pi t / 2)."""

    name: ClassVar[str] = "cosine"

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = sin(pi t / 2)."""
        return torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = cos(pi t / 2), computed as sin(pi (1 - t) / 2), because 1 - t is exact near t = 1."""
        return torch.sin(0.5 * math.pi * (1 - t))

    def d_alpha(self, t: Tensor) -> Tensor:
        """alpha'_t = (pi / 2) sigma."""
        return 0.5 * math.pi * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """sigma'_t = -(pi / 2) alpha."""
        return -0.5 * math.pi * self.alpha(t)
