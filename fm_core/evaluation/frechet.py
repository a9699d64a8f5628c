"""The Fréchet distance between two sets of features.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64 throughout (Dowson and Landau 1982; Heusel
et al. 2017).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

JACKKNIFE_BLOCKS = 20


@dataclass(frozen=True)
class Moments:
    """Sums of features; they add up over parts of a set."""

    count: int
    total: Tensor
    """Sum of features, float64 [D]."""
    products: Tensor
    """Sum of outer products, float64 [D, D]."""

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Moments of features [N, D]."""
        rows = features.double()
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.count - other.count, self.total - other.total, self.products - other.products)

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


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance (squared, as FID is) between the Gaussians of two sets of features.

    The trace of the root is taken through the symmetric form S1^(1/2) S2 S1^(1/2), whose
    eigenvalues are real; those that rounding makes negative count as zero.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    difference = a.mean - b.mean
    distance = difference @ difference + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())


def jackknife_error(features: Tensor, reference: Moments, blocks: int = JACKKNIFE_BLOCKS) -> float:
    """Standard error of the distance of features [N, D] to a fixed reference.

    Delete-a-block jackknife over `blocks` interleaved blocks of images.
    """
    blocks = min(blocks, len(features) // 2)
    whole = Moments.of(features)
    without = torch.tensor(
        [frechet_distance(whole - Moments.of(features[block::blocks]), reference) for block in range(blocks)],
        dtype=torch.float64,
    )
    return ((blocks - 1) / blocks * (without - without.mean()).square().sum()).sqrt().item()
