"""Training objectives: what the network predicts, the loss, and the velocity implied by a prediction.

Every objective provides `loss(network, sample)` and `velocity(network)`; sampling and likelihood use only the
velocity. A network is any callable `network(t, x, label)` with t [N], x [N, ...] and label int64 [N] or None;
its result has the shape of x.

Equation numbers are those of Lipman et al. (arXiv 2210.02747). Its eqs. 43 and 46 regress *minus* the score;
here s always means +grad log p_t(x).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fm_core.method.compatibility import (
    require_diffusion_path,
    require_positive_alpha,
    truncate_at_sigma_floor,
)
from fm_core.method.couplings import Coupling
from fm_core.method.paths import Path, PathSample, expand_like
from fm_core.method.types import Interval, Network, Velocity


class Objective(ABC):
    """Base class of objectives: a prediction, its loss and its velocity on a given path.

    A new objective subclasses this class or, with less code, `Regression`, and overrides `interval_on` if it
    is not defined on every path. `name` identifies it in configuration files.

    Args:
        path: the probability path.

    Raises:
        UserError: this objective cannot be used on this path; the message gives the reason.
    """

    name: ClassVar[str] = ""
    takes_gradients: ClassVar[bool] = False
    """Whether the loss itself differentiates through the network. It must then get the unwrapped module: a
    wrapper with gradient hooks would mistake these gradients for those of the backward pass."""

    follows_path: ClassVar[bool] = True
    """Whether the velocity is E[alpha' x1 + sigma' x0 | x_t], so that it determines E[x1 | x_t]."""

    predicts_velocity: ClassVar[bool] = False
    """Whether the network's prediction is the velocity."""

    equal_times: float | None = None
    """Fraction of the examples whose two times are equal; None if the network has one time."""

    extra_forwards: float = 0.0
    """Forward passes without gradients that the loss adds, as a mean per example; a JVP counts as two."""

    @property
    def two_times(self) -> bool:
        """Whether the network has two times, so that it is a flow map (`flow_map.FlowMap`)."""
        return self.equal_times is not None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.interval = self.interval_on(path)

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The interval of t of this objective on a path, used in training, sampling and likelihood.

        Raises:
            UserError: this objective cannot be used on this path.
        """
        return path.interval

    def check_coupling(self, coupling: Coupling) -> None:
        """Refuse a coupling under which the loss would be invalid; the base class accepts all.

        Raises:
            UserError: this objective cannot be used with this coupling; the message gives the reason.
        """
        return

    @abstractmethod
    def loss(self, network: Network, sample: PathSample, label: Tensor | None = None) -> Tensor:
        """Loss of each example, [N], averaged over dimensions; training minimizes its mean."""

    @abstractmethod
    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The marginal velocity u_t(x) implied by a prediction at t [N] and x; all are [N, ...]."""

    def velocity(self, network: Network, label: Tensor | None = None) -> Velocity:
        """The velocity u(t, x) of a network: t scalar or [N], x [N, ...] -> [N, ...], in the dtype of x."""

        def field(t: Tensor, x: Tensor) -> Tensor:
            t = t.to(x.dtype).expand(x.shape[0])
            return self.velocity_from(network(t, x, label).to(x.dtype), t, x)

        return field


class Regression(Objective):
    """Base class of objectives whose loss is the mean square of a residual."""

    @abstractmethod
    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """The weighted residual, [N, ...], whose mean square is the loss."""

    def loss(self, network: Network, sample: PathSample, label: Tensor | None = None) -> Tensor:
        """Loss of each example, [N]: the mean over its dimensions of the squared residual.

        Only the network may run in 16 bits (autocast); its output is converted to the dtype of x_t.
        """
        prediction = network(sample.t, sample.x_t, label).to(sample.x_t.dtype)
        return self.residual(prediction, sample).square().flatten(1).mean(1)


class FlowMatching(Regression):
    """Conditional flow matching, eq. 14: the network predicts the velocity. Defined on every path."""

    name: ClassVar[str] = "flow-matching"
    predicts_velocity: ClassVar[bool] = True

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """Residual v - u_t(x_t | x1)."""
        return prediction - sample.velocity

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Return the prediction, which is the velocity."""
        return prediction


class ScoreMatching(Regression):
    """Denoising score matching, eq. 42 with lambda = sigma_t^2: the network predicts s = grad log p_t(x).

    The conditional score is -x0 / sigma_t, and sigma_t^2 |s + x0 / sigma_t|^2 = |sigma_t s + x0|^2 needs no
    division.
    """

    name: ClassVar[str] = "score-matching"

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's interval; refuses paths on which alpha_t vanishes."""
        return require_positive_alpha(cls.name, path)

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """Residual sigma_t s + x0."""
        return expand_like(self.path.sigma(sample.t), sample.x_t) * prediction + sample.x0

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Velocity (alpha'/alpha) x + (g^2 / 2) s; for VP, eq. 46 with the sign of s corrected."""
        drift = expand_like(self.path.d_alpha(t) / self.path.alpha(t), x)
        return drift * x + expand_like(self.path.diffusion(t) / 2, x) * prediction


class ScoreFlow(ScoreMatching):
    """Score matching with the likelihood weighting lambda = g_t^2 of Song et al. 2021 (beta(1 - t) for VP).

    Over the full interval the weighted loss has heavy tails: lambda / sigma_t^2 grows like 1 / (1 - t).
    """

    name: ClassVar[str] = "scoreflow"

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's interval; refuses paths that are not diffusions."""
        return require_diffusion_path(cls.name, path)

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """Residual g_t (s + x0 / sigma_t)."""
        weight = torch.sqrt(self.path.diffusion(sample.t)) / self.path.sigma(sample.t)
        return expand_like(weight, sample.x_t) * super().residual(prediction, sample)


class NoisePrediction(Regression):
    """DDPM's simple loss (App. E.1): the network predicts the noise, E[x0 | x_t]."""

    name: ClassVar[str] = "noise-prediction"

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's interval; refuses paths on which alpha_t vanishes."""
        return require_positive_alpha(cls.name, path)

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """Residual eps - x0."""
        return prediction - sample.x0

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Velocity (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps."""
        ratio = self.path.d_alpha(t) / self.path.alpha(t)
        return (
            expand_like(ratio, x) * x
            + expand_like(self.path.d_sigma(t) - self.path.sigma(t) * ratio, x) * prediction
        )


class DataPrediction(Regression):
    """x1-prediction: the network predicts the data, E[x1 | x_t]."""

    name: ClassVar[str] = "data-prediction"

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's interval, truncated where sigma_t falls below SIGMA_FLOOR."""
        return truncate_at_sigma_floor(cls.name, path)

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """Residual x1_hat - x1."""
        return prediction - sample.x1

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Velocity (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) x1_hat."""
        ratio = self.path.d_sigma(t) / self.path.sigma(t)
        return (
            expand_like(ratio, x) * x
            + expand_like(self.path.d_alpha(t) - self.path.alpha(t) * ratio, x) * prediction
        )
