"""Standard errors of statistics that are nearly quadratic in the deviations of a sample.

To second order, the value of such a statistic for N images is its value for infinitely many images, plus the
mean over images of an influence L(x), plus the sum over pairs of φ(x, y) / (2 N²) (Hoeffding's
decomposition). Its variance is

    Var L / N + E φ² / (2 N²).

For a distance between two equal distributions, L = 0 and only the second term remains. An influence that is
computed from the sample itself contains the sample's noise. Its variance divided by N, the infinitesimal
jackknife, is therefore Var L / N + E φ² / N², which is too large by up to a factor of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class InfluenceTerms:
    """Terms of a statistic's error for n of its N images: L of each, and φ of each with a few others.

    The difference of the terms of two statistics is those of their difference, if image i of both sets is a
    pair, e.g. samples of the same noise. Pairs are independent of each other, so that the formulas of
    `SamplingError` apply to them as they do to images. What both statistics share cancels.
    """

    images: Tensor
    """Indices of the n images among all N, int64 [n]; pairs are defined by their order."""
    first: Tensor
    """L(x) with half of its own second-order effect, float64 [n]; its mean has no meaning."""
    pairs: Tensor
    """φ(x, y) of image i and the image P places before it, for P = 1, 2, ..., float64 [P, n]."""
    count: int
    """N, the number of images of the statistic."""

    def error(self) -> SamplingError:
        """Error of the statistic."""
        second = self.pairs.square().sum().item() / self.pairs.numel() / (2 * self.count**2)
        return SamplingError.of(self.first.var().item() / self.count, second, heavy_tails(self.first))

    def less(self, other: "InfluenceTerms") -> "InfluenceTerms | None":
        """Terms of this statistic minus another; None unless both have the same images in the same order."""
        if self.count != other.count or not torch.equal(self.images, other.images):
            return None
        return InfluenceTerms(self.images, self.first - other.first, self.pairs - other.pairs, self.count)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a file; the terms are rounded to float32."""
        terms = {"first": self.first.float(), "pairs": self.pairs.float()}
        return {"images": self.images, "count": torch.tensor(self.count), **terms}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "InfluenceTerms":
        """The terms in a file. Raises KeyError if a tensor is missing."""
        terms = (tensors[name].double() for name in ("first", "pairs"))
        return cls(tensors["images"], *terms, count=int(tensors["count"]))


def heavy_tails(*influences: Tensor) -> str | None:
    """HEAVY_TAILED if the variance of influences [n] has a relative standard error above `TAIL_ERROR`."""
    for values in influences:
        deviations = (values - values.mean()).square()
        if (deviations.std() / len(values) ** 0.5 > TAIL_ERROR * deviations.mean()).item():
            return HEAVY_TAILED
    return None
