"""Standard errors of statistics that are nearly quadratic in the deviations of a sample.

To second order such a statistic of N images is its value for infinitely many, plus the mean over images of
an influence L(x), plus the sum over pairs of φ(x, y) / (2 N²) (Hoeffding's decomposition). Its variance is

    Var L / N + E φ² / (2 N²).

A distance between two equal distributions has L = 0, so that the second term is all there is. The influence
that is computed from the sample itself contains the noise of the sample: its variance over N, the
infinitesimal jackknife, is Var L / N + E φ² / N², and too large by up to a factor of two.
"""

from dataclasses import dataclass

from torch import Tensor

SHRINKAGE = 0.3
"""First-order parts of about this share of the second-order one are within the noise of their estimate."""
LEAST = 0.5
"""A variance is at least this share of its second-order part: it may be estimated too low by chance."""
TAIL_ERROR = 0.3
"""Relative error of a variance from which a few images decide it."""
HEAVY_TAILED = "a few images decide it"
"""Why an error is unreliable, and probably too small."""


@dataclass(frozen=True)
class SamplingError:
    """A variance over independent samples."""

    variance: float
    second_order: float
    """The second-order part of the variance."""
    unreliable: str | None
    """Why the variance is not to be relied on; None if it is."""

    @property
    def stderr(self) -> float:
        """Standard error."""
        return self.variance**0.5

    @classmethod
    def of(cls, jackknife: float, second_order: float, unreliable: str | None) -> "SamplingError":
        """Variance from the infinitesimal jackknife and the second-order part E φ² / (2 N²).

        What remains of the jackknife without twice the second-order part is the first-order part. It is noisy
        where it is small: positive values are shrunk, negative ones limited.
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
