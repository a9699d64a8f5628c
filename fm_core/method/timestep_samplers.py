"""Timestep samplers: the distribution of t in training.

A sampler is the quantile function (inverse CDF) of its distribution, so that the uniform numbers can be keyed
by stream position elsewhere: `times(u)` maps u [N] in [0, 1) to t [N] in the interval, in the dtype of u.
Every sampler except `Uniform` reweights the loss over t, deliberately and without correction.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.types import Interval


class TimestepSampler(ABC):
    """Base class: a distribution of t on an interval, given by its quantile function.

    `name` identifies the sampler in configuration files.
    """

    name: ClassVar[str]
    interval: Interval

    @abstractmethod
    def times(self, u: Tensor) -> Tensor:
        """Return the quantiles t [N] at the probabilities u [N] in [0, 1)."""


@dataclass(frozen=True)
class Uniform(TimestepSampler):
    """t ~ U[interval], the paper's choice (eq. 14)."""

    name: ClassVar[str] = "uniform"
    interval: Interval = (0.0, 1.0)

    def times(self, u: Tensor) -> Tensor:
        """Return start + (end - start) u."""
        start, end = self.interval
        return (start + (end - start) * u).clamp(max=end)


@dataclass(frozen=True)
class LogitNormal(TimestepSampler):
    """logit(t) ~ N(mean, std^2), with (0, 1) scaled to the interval (Esser et al. 2024).

    t = 1 is data: a positive mean favors times near the data. In Esser et al., where t = 1 is noise, it has
    the opposite sign.
    """

    name: ClassVar[str] = "logit-normal"
    interval: Interval = (0.0, 1.0)
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise UserError(f"{self.name}: std must be positive, not {self.std}")

    def times(self, u: Tensor) -> Tensor:
        """Return sigmoid(mean + std Phi^-1(u)), scaled to the interval; u = 0 maps to its start."""
        start, end = self.interval
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return (start + (end - start) * t).clamp(max=end)


@dataclass(frozen=True)
class EDMSkewed(TimestepSampler):
    """t = 1 / (1 + sigma) with log sigma ~ N(log_mean, log_std^2), the training noise levels of EDM.

    sigma is the ratio sigma_t / alpha_t of the optimal-transport path, so t is logit-normal with mean
    -log_mean: skewed towards the data. The default parameters are those of Karras et al. 2022.
    """

    name: ClassVar[str] = "edm"
    interval: Interval = (0.0, 1.0)
    log_mean: float = -1.2
    log_std: float = 1.2

    def __post_init__(self) -> None:
        if self.log_std <= 0:
            raise UserError(f"{self.name}: log_std must be positive, not {self.log_std}")

    def times(self, u: Tensor) -> Tensor:
        """Return the quantiles of 1 / (1 + sigma), clamped to the interval."""
        t = torch.sigmoid(-self.log_mean + self.log_std * torch.special.ndtri(u))
        return t.clamp(*self.interval)
