"""What the network predicts, how it is trained to, and the velocity that follows from its prediction.

Every objective gives the same two things: `loss(network, sample)` and `velocity(network)`. The second is the
only thing the sampler and the likelihood ever see. Time runs from t = 0 (noise) to t = 1 (data); a network is
any callable `network(t, x, label)`: t [N], x [N, ...], label int64 [N] or None, the result shaped like x.

Equation numbers are those of Lipman et al. (arXiv 2210.02747). Its eqs. 43 and 46 regress *minus* the score;
here s always means +grad log p_t(x).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fm_core.method.compatibility import cut_where_sigma_vanishes, require_diffusion, require_positive_alpha
from fm_core.method.couplings import Coupling
from fm_core.method.paths import Path, PathSample, expand_like
from fm_core.method.types import Interval, Network, Velocity


class Objective(ABC):
    """A prediction, its loss and its velocity on a given path.

    A new objective is a subclass of this or, with less to write, of `Regression`, with its own `interval_on`
    if it is not regular on every path. `name` is what configuration files call it.

    Args:
        path: the probability path.

    Raises:
        UserError: this objective cannot be used on this path; the message says why.
    """

    name: ClassVar[str] = ""
    takes_gradients: ClassVar[bool] = False
    """Whether the loss itself takes gradients through the network, which must then be the bare module: a
    wrapper that acts on gradients as they appear would take them for those of the backward pass."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.interval = self.interval_on(path)

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The range of t of this pair, for training, sampling and likelihood alike.

        Raises:
            UserError: the pair is not regular.
        """
        return path.interval

    def check_coupling(self, coupling: Coupling) -> None:
        """Refuse a coupling under which the loss is not what it says; this one takes all.

        Raises:
            UserError: this objective cannot be used with this coupling; the message says why.
        """
        return

    @abstractmethod
    def loss(self, network: Network, sample: PathSample, label: Tensor | None = None) -> Tensor:
        """Loss of each example, [N], per dimension: what training brings down."""

    @abstractmethod
    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The marginal velocity u_t(x) that a prediction at t [N] and x stands for; all [N, ...]."""

    def velocity(self, network: Network, label: Tensor | None = None) -> Velocity:
        """u(t, x) of the trained network: t scalar or [N], x [N, ...] -> [N, ...], in the type of x."""

        def field(t: Tensor, x: Tensor) -> Tensor:
            t = t.to(x.dtype).expand(x.shape[0])
            return self.velocity_from(network(t, x, label).to(x.dtype), t, x)

        return field


class Regression(Objective):
    """An objective whose loss is a mean square: a subclass says of what."""

    @abstractmethod
    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """Weighted difference, [N, ...], whose mean square is the loss."""

    def loss(self, network: Network, sample: PathSample, label: Tensor | None = None) -> Tensor:
        """Loss of each example, [N]: the mean over its dimensions of the squared residual.

        Only the network may run in 16 bits (autocast); its output is taken back to the type of x_t.
        """
        prediction = network(sample.t, sample.x_t, label).to(sample.x_t.dtype)
        return self.residual(prediction, sample).square().flatten(1).mean(1)


class FlowMatching(Regression):
    """Conditional flow matching, eq. 14: the network is the velocity. Regular on every path."""

    name: ClassVar[str] = "flow-matching"

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """The difference v - u_t(x_t | x1)."""
        return prediction - sample.velocity

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction


class ScoreMatching(Regression):
    """Denoising score matching, eq. 42 with lambda = sigma_t^2: the network is the score s = grad log p_t(x).

    The conditional score is -x0 / sigma_t, and sigma_t^2 |s + x0 / sigma_t|^2 = |sigma_t s + x0|^2 divides
    by nothing.
    """

    name: ClassVar[str] = "score-matching"

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's, where alpha_t > 0."""
        return require_positive_alpha(cls.name, path)

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """The sum sigma_t s + x0."""
        return expand_like(self.path.sigma(sample.t), sample.x_t) * prediction + sample.x0

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Velocity (alpha'/alpha) x + (g^2 / 2) s; for VP eq. 46 with the sign of s put right."""
        drift = expand_like(self.path.d_alpha(t) / self.path.alpha(t), x)
        return drift * x + expand_like(self.path.diffusion(t) / 2, x) * prediction


class ScoreFlow(ScoreMatching):
    """Score matching with the likelihood weighting lambda = g_t^2 of Song et al. 2021 (beta(1 - t) for VP).

    On the whole interval the weighted loss has heavy tails: lambda / sigma_t^2 grows like 1 / (1 - t).
    """

    name: ClassVar[str] = "scoreflow"

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's, where it is that of a diffusion."""
        return require_diffusion(cls.name, path)

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """The weighted sum g_t (s + x0 / sigma_t)."""
        weight = torch.sqrt(self.path.diffusion(sample.t)) / self.path.sigma(sample.t)
        return expand_like(weight, sample.x_t) * super().residual(prediction, sample)


class NoisePrediction(Regression):
    """DDPM's simple loss (App. E.1): the network is the noise, E[x0 | x_t]."""

    name: ClassVar[str] = "noise-prediction"

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's, where alpha_t > 0."""
        return require_positive_alpha(cls.name, path)

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """The difference eps - x0."""
        return prediction - sample.x0

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Velocity (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps."""
        ratio = self.path.d_alpha(t) / self.path.alpha(t)
        return (
            expand_like(ratio, x) * x
            + expand_like(self.path.d_sigma(t) - self.path.sigma(t) * ratio, x) * prediction
        )


class DataPrediction(Regression):
    """The network is the data, E[x1 | x_t]."""

    name: ClassVar[str] = "data-prediction"

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's, cut where sigma_t falls below a floor."""
        return cut_where_sigma_vanishes(cls.name, path)

    def residual(self, prediction: Tensor, sample: PathSample) -> Tensor:
        """The difference x1_hat - x1."""
        return prediction - sample.x1

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Velocity (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) x1_hat."""
        ratio = self.path.d_sigma(t) / self.path.sigma(t)
        return (
            expand_like(ratio, x) * x
            + expand_like(self.path.d_alpha(t) - self.path.alpha(t) * ratio, x) * prediction
        )
