"""Standard error of a Fréchet distance, from each image's influence on the distance.

The first and second derivatives of the distance with respect to mean and covariance come from one
eigendecomposition. `sampling_error` describes how the variance follows from them.
"""

import math

import torch
from torch import Tensor

from fm_core.evaluation.metrics.feature_statistics import Gaussian, zero_rounding_noise
from fm_core.evaluation.metrics.sampling_error import InfluenceTerms

OPERATIONS = 2**34
"""Number of images used for an error estimate, times D²: 4,096 images for D = 2,048, 4 million for D = 64."""
PAIRS_PER_IMAGE = 4
"""Number of other images with which each image is paired, for the mean of φ²."""
SPACING = 1 / 3
"""Distance of the nodes of `curvature_factors`, which gives a relative error below 1e-11."""
NEGLIGIBLE = 1e-11
"""Relative size of the terms that `curvature_factors` leaves out."""


def error_images(count: int, dimension: int) -> int:
    """Number of images used to estimate the error of a distance of `count` images of `dimension` features."""
    return min(count, max(4, OPERATIONS // dimension**2))


class FrechetInfluence:
    """Influence of images on the Fréchet distance at given moments.

    With R the root of the reference's covariance, R S R = V diag(λ) V^T, t = V^T R (x - m) for an image x,
    and u likewise for an image y,

        L(x) = 2 (m - m_r) . (x - m) + |x - m|² - sum t_i² / sqrt(λ_i), minus its mean,
        φ(x, y) = 2 sum t_i u_i / sqrt(λ_i) + sum c_ij A_ij(x) A_ij(y),  A_ij(x) = t_i t_j - δ_ij λ_i,

    with c_ij = 1 / (sqrt(λ_i λ_j) (sqrt(λ_i) + sqrt(λ_j))).
    """

    def __init__(self, mean: Tensor, whitened: Tensor, reference: Gaussian) -> None:
        """Decompose R S R, given as `whitened` [D, D]; the mean [D] and S are of the images."""
        self.mean, self.shift = mean, mean - reference.mean
        values, vectors = torch.linalg.eigh(whitened)
        values = zero_rounding_noise(values)
        first = int((values == 0).sum())
        self.values, self.roots = values[first:], values[first:].sqrt()
        self.whitening = reference.root @ vectors[:, first:]
        self.factors = curvature_factors(self.roots)
        self.cross = self.roots.sum()
        """Trace of the square root of the product of both covariances."""

    def first_order(self, rows: Tensor) -> Tensor:
        """L(x) before its mean is subtracted, float64 [n], for features [n, D]."""
        centered = rows.double() - self.mean
        return self._first_order(centered, (centered @ self.whitening).square())

    def _first_order(self, centered: Tensor, squares: Tensor) -> Tensor:
        linear = 2 * (centered @ self.shift) + centered.square().sum(1)
        return linear - squares @ (1 / self.roots)

    def terms(self, features: Tensor, images: Tensor, count: int) -> InfluenceTerms:
        """Terms of the error of the distance of `count` images.

        Args:
            features: features [n, D] of n of these images, in random order.
            images: their indices, int64 [n].
            count: number of images of the distance.
        """
        centered = features.double() - self.mean
        whitened = centered @ self.whitening
        squares = whitened.square()
        # c_ii λ_i
        diagonal = 1 / (2 * self.roots)
        constant = (diagonal * self.values).sum()

        def second_order(products: Tensor, linear: Tensor) -> Tensor:
            """φ of pairs, from the products [n, D] of their t and u."""
            quadratic = (products @ self.factors).square().sum(1)
            return 2 * (products @ (1 / self.roots)) + quadratic - linear + constant

        linear = squares @ diagonal
        # The moments contain the image itself, and half of this second-order effect is in the distance too.
        first = self._first_order(centered, squares) - second_order(squares, 2 * linear) / (2 * count)
        pairs = [
            second_order(whitened * whitened.roll(offset, 0), linear + linear.roll(offset, 0))
            for offset in range(1, min(PAIRS_PER_IMAGE, len(features) - 1) + 1)
        ]
        return InfluenceTerms(images.cpu(), first.cpu(), torch.stack(pairs).cpu(), count)


def curvature_factors(roots: Tensor) -> Tensor:
    """Factors F [D, K] of the matrix c_ij = 1 / (r_i r_j (r_i + r_j)), so that c = F F^T.

    With 1 / (r + q) the integral of exp(-s (r + q)) over s > 0, each node s of the trapezoidal rule in log s
    gives one column. K is about 90 to 130, however large D is.

    Args:
        roots: r [D], positive.
    """
    if not len(roots):
        return roots.new_zeros(0, 0)
    low = math.log(NEGLIGIBLE / (2 * roots.amax().item()))
    high = math.log(-math.log(NEGLIGIBLE) / (2 * roots.amin().item())) + SPACING
    nodes = torch.arange(low, high, SPACING, dtype=roots.dtype, device=roots.device).exp()
    return (SPACING * nodes).sqrt() * torch.exp(-torch.outer(roots, nodes)) / roots[:, None]
