"""User-defined parts of the method: a path, an objective, a coupling and a time distribution."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fm_core.method.couplings import Coupling
from fm_core.method.objectives import Regression
from fm_core.method.paths import Path
from fm_core.method.timestep_samplers import TimestepSampler


@dataclass(frozen=True)
class Power(Path):
    """alpha_t = t^p, sigma_t = 1 - t^p (1 - floor)."""

    name: ClassVar[str] = "power"
    power: float = 2.0
    floor: float = 0.05

    def alpha(self, t):
        return t**self.power

    def sigma(self, t):
        return 1 - (1 - self.floor) * t**self.power

    def d_alpha(self, t):
        return self.power * t ** (self.power - 1)

    def d_sigma(self, t):
        return -(1 - self.floor) * self.d_alpha(t)


@dataclass(frozen=True)
class IntegerPower(Power):
    """A path that refuses options with a message of two lines."""

    name: ClassVar[str] = "integer-power"

    def __post_init__(self):
        if self.power % 1:
            raise ValueError("no half\npowers")


class HalfVelocity(Regression):
    """The network is half the velocity."""

    name: ClassVar[str] = "half-velocity"

    def residual(self, prediction, sample):
        return 2 * prediction - sample.velocity

    def velocity_from(self, prediction, t, x):
        return 2 * prediction


class Reversed(Coupling):
    name: ClassVar[str] = "reversed"

    def pair(self, x0, x1, label=None):
        return x0.flip(0), x1, label


@dataclass(frozen=True)
class Squared(TimestepSampler):
    name: ClassVar[str] = "squared"
    interval: tuple[float, float] = (0.0, 1.0)

    def times(self, u):
        return self.interval[0] + (self.interval[1] - self.interval[0]) * torch.square(u)


class NotAPath:
    pass
