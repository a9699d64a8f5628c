"""Means and covariances of features, as sums that add up over parts of a set, in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """Sums of features; they add up over parts of a set."""

    count: int
    total: Tensor
    """Sum of features, float64 [D]."""
    products: Tensor
    """Sum of outer products, float64 [D, D]."""

    @classmethod
    def of(cls, features: Tensor) -> "FeatureMoments":
        """Moments of features [N, D]."""
        rows = features.double()
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: "FeatureMoments") -> "FeatureMoments":
        return FeatureMoments(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    @property
    def dimension(self) -> int:
        """D."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean, [D]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, [D, D]. ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, not {self.count}")
        mean = self.mean
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


@dataclass(frozen=True)
class Gaussian:
    """What a Fréchet distance needs to know of a reference; the root is taken once."""

    mean: Tensor
    """float64 [D]."""
    covariance: Tensor
    """float64 [D, D]."""
    count: int | None
    """Images it was made of; None where imported statistics do not tell."""

    @classmethod
    def of(cls, moments: FeatureMoments) -> "Gaussian":
        """The Gaussian of some moments; ValueError for fewer than two rows."""
        return cls(moments.mean, moments.covariance, moments.count)

    @property
    def dimension(self) -> int:
        """D."""
        return len(self.mean)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, float64 [D, D]."""
        return symmetric_root(self.covariance)

    def to(self, device: torch.device) -> "Gaussian":
        """The same on a device; a root that was taken goes along."""
        moved = Gaussian(self.mean.to(device), self.covariance.to(device), self.count)
        if "root" in self.__dict__:
            moved.__dict__["root"] = self.root.to(device)
        return moved


def symmetric_root(covariance: Tensor) -> Tensor:
    """The square root of a positive semidefinite matrix [D, D] through its eigenvectors."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * without_rounding(values).sqrt()) @ vectors.T


def without_rounding(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues [D] of a positive semidefinite matrix, those that are rounding noise set to zero.

    The noise is about 1e-16 of the largest, but its root 1e-8, and a covariance of few images has thousands.
    """
    floor = eigenvalues.amax().clamp_min(0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > floor, eigenvalues, torch.zeros_like(eigenvalues))
