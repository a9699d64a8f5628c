"""Standard errors of statistics that are nearly quadratic in the deviations of a sample.

To second order, the value of such a statistic for N images is its value for infinitely many images, plus the
mean over images of an influence L(x), plus the sum over pairs of φ(x, y) / (2 N²) (Hoeffding's
decomposition). Its variance is

    Var L / N + E φ² / (2 N²).

For a distance between two equal distributions, L = 0 and only the second term remains. An influence that is
computed from the sample itself contains the sample's noise. Its variance divided by N, the infinitesimal
jackknife, is therefore Var L / N + E φ² / N², which is too large by up to a factor of two.
"""

from dataclasses import dataclass

from torch import Tensor

SHRINKAGE = 0.3
"""Ratio of first-order to second-order part below which the first-order part is within its own noise."""
LEAST = 0.5
"""Lower limit of a variance relative to its second-order part, as its estimate may be too low by chance."""
TAIL_ERROR = 0.3
"""Relative error of a variance above which a few images are considered to dominate it."""
HEAVY_TAILED = "a few images decide it"
"""Reason reported for an error that is unreliable and probably too small."""


@dataclass(frozen=True)
class SamplingError:
    """Variance of a statistic over independent samples."""

    variance: float
    second_order: float
    """Second-order part of the variance."""
    unreliable: str | None
    """Why the variance is unreliable; None if it is reliable."""

    @property
    def stderr(self) -> float:
        """Standard error."""
        return self.variance**0.5

    @classmethod
    def of(cls, jackknife: float, second_order: float, unreliable: str | None) -> "SamplingError":
        """Compute the variance from the infinitesimal jackknife and the second-order part E φ² / (2 N²).

        The first-order part is the jackknife minus twice the second-order part. It is noisy where it is
        small, so positive values are shrunk, and negative values are limited.
        """
        if second_order <= 0:
            return cls(max(0.0, jackknife), 0.0, unreliable)
        excess = jackknife / second_order - 2
        first = excess**2 / (excess + SHRINKAGE) if excess > 0 else max(excess, LEAST - 1)
        return cls((1 + first) * second_order, second_order, unreliable)


def heavy_tails(*influences: Tensor) -> str | None:
    """HEAVY_TAILED if the variance of influences [n] has a relative standard error above `TAIL_ERROR`."""
    for values in influences:
        deviations = (values - values.mean()).square()
        if (deviations.std() / len(values) ** 0.5 > TAIL_ERROR * deviations.mean()).item():
            return HEAVY_TAILED
    return None
