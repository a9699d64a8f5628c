"""Mean and covariance of features, from float64 sums that can be added across parts of a set."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BLOCK = 256
"""Columns of a block of `symmetric_product`; a product of at most as many columns is computed at once."""


@dataclass(frozen=True)
class FeatureMoments:
    """Count, sum and sum of outer products of features; `+` combines disjoint sets of images."""

    count: int
    total: Tensor
    """Sum of features, float64 [D]."""
    products: Tensor
    """Sum of outer products, float64 [D, D]."""

    @classmethod
    def of(cls, features: Tensor) -> "FeatureMoments":
        """Compute the moments of features [N, D]."""
        rows = features.double()
        return cls(len(rows), rows.sum(0), symmetric_product(rows, rows))

    def __add__(self, other: "FeatureMoments") -> "FeatureMoments":
        return FeatureMoments(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    @property
    def dimension(self) -> int:
        """Number of features D."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean, float64 [D]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 [D, D]. Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, not {self.count}")
        mean = self.mean
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


class MomentAccumulator:
    """Moments of the features of consecutive images, and the features of chosen images."""

    def __init__(self, chosen: Tensor, first: int = 0, *, rows_only: bool = False) -> None:
        """`chosen` are increasing numbers of images, int64 [M]; `first` is the number of the first image.

        `rows_only`: collect the features of the chosen images without moments.
        """
        self._chosen, self._next, self._rows_only = chosen, first, rows_only
        self._moments: FeatureMoments | None = None
        self._rows = list[Tensor]()

    def add(self, features: Tensor) -> None:
        """Add the features [n, D] of the next n images."""
        first, end = self._next, self._next + len(features)
        if not self._rows_only:
            part = FeatureMoments.of(features)
            self._moments = part if self._moments is None else self._moments + part
        inside = (self._chosen >= first) & (self._chosen < end)
        self._rows.append(features[self._chosen[inside] - first])
        self._next = end

    @property
    def moments(self) -> FeatureMoments:
        """Moments of all images. Raises ValueError if there are none."""
        if self._moments is None:
            raise ValueError("no images were added, or only their rows")
        return self._moments

    @property
    def rows(self) -> Tensor:
        """Features [m, D] of the chosen images among those that were added."""
        return torch.cat(self._rows)


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a reference set; the square root of the covariance is cached."""

    mean: Tensor
    """Mean, float64 [D]."""
    covariance: Tensor
    """Covariance, float64 [D, D]."""
    count: int | None
    """Number of images; None if imported statistics do not record it."""

    @classmethod
    def of(cls, moments: FeatureMoments) -> "Gaussian":
        """Build from moments. Raises ValueError for fewer than two images."""
        return cls(moments.mean, moments.covariance, moments.count)

    @property
    def dimension(self) -> int:
        """Number of features D."""
        return len(self.mean)

    @cached_property
    def root(self) -> Tensor:
        """Symmetric square root of the covariance, float64 [D, D]."""
        return symmetric_sqrt(self.covariance)

    def whiten(self, covariance: Tensor) -> Tensor:
        """R S R for another covariance S [D, D], with R = `root`."""
        return symmetric_product(self.root, covariance @ self.root)

    def to(self, device: torch.device) -> "Gaussian":
        """Copy to a device, including the cached square root."""
        moved = Gaussian(self.mean.to(device), self.covariance.to(device), self.count)
        if "root" in self.__dict__:
            moved.__dict__["root"] = self.root.to(device)
        return moved


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Product left^T right of matrices [N, D] if it is known to be symmetric, [D, D].

    Only blocks on and above the diagonal are computed, which for large D is half of the operations.
    """
    dimension = left.shape[1]
    if dimension <= BLOCK:
        return left.T @ right
    product = left.new_empty(dimension, dimension)
    for first in range(0, dimension, BLOCK):
        end = min(first + BLOCK, dimension)
        upper = left[:, first:end].T @ right[:, first:]
        product[first:end, first:] = upper
        product[end:, first:end] = upper[:, end - first :].T
    return product


def symmetric_sqrt(covariance: Tensor) -> Tensor:
    """Square root of a positive semidefinite matrix [D, D], by eigendecomposition."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * zero_rounding_noise(values).sqrt()) @ vectors.T


def zero_rounding_noise(eigenvalues: Tensor) -> Tensor:
    """Set to zero those eigenvalues [D] of a positive semidefinite matrix that are rounding noise.

    The noise is about 1e-16 of the largest eigenvalue, but its square root is about 1e-8 of the largest
    square root, and the covariance of few images has thousands of such eigenvalues.
    """
    floor = eigenvalues.amax().clamp_min(0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > floor, eigenvalues, torch.zeros_like(eigenvalues))
