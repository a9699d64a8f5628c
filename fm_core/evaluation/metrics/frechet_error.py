"""Standard error of a Fréchet distance, from each image's influence on the distance.

The first and second derivatives of the distance with respect to mean and covariance come from one
eigendecomposition. `sampling_error` describes how the variance follows from them.
"""

import torch
from torch import Tensor

from fm_core.evaluation.metrics.feature_statistics import Gaussian, zero_rounding_noise
from fm_core.evaluation.metrics.sampling_error import InfluenceTerms

OPERATIONS = 2**34
"""Number of images used for an error estimate, times D²: 4,096 images for D = 2,048, 4 million for D = 64."""
PAIRS_PER_IMAGE = 4
"""Number of other images with which each image is paired, for the mean of φ²."""


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

    def __init__(self, mean: Tensor, covariance: Tensor, reference: Gaussian) -> None:
        """Decompose the product of the covariances; mean [D] and covariance [D, D] are of the images."""
        self.mean, self.shift = mean, mean - reference.mean
        values, vectors = torch.linalg.eigh(reference.root @ covariance @ reference.root)
        values = zero_rounding_noise(values)
        first = int((values == 0).sum())
        self.values, self.roots = values[first:], values[first:].sqrt()
        self.whitening = reference.root @ vectors[:, first:]
        self.curvature = 1 / (torch.outer(self.roots, self.roots) * (self.roots[:, None] + self.roots))
        self.cross = self.roots.sum()
        """Trace of the square root of the product of both covariances."""

    def first_order(self, rows: Tensor) -> Tensor:
        """L(x) before its mean is subtracted, float64 [n], for features [n, D]."""
        centered = rows.double() - self.mean
        whitened = centered @ self.whitening
        linear = 2 * centered @ self.shift + centered.square().sum(1)
        return linear - (whitened.square() / self.roots).sum(1)

    def terms(self, features: Tensor, images: Tensor, count: int) -> InfluenceTerms:
        """Terms of the error of the distance of `count` images.

        Args:
            features: features [n, D] of n of these images, in random order.
            images: their indices, int64 [n].
            count: number of images of the distance.
        """
        whitened = (features.double() - self.mean) @ self.whitening
        squares = whitened.square()
        diagonal = self.curvature.diagonal() * self.values
        constant = (diagonal * self.values).sum()

        def second_order(products: Tensor, linear: Tensor) -> Tensor:
            """φ of pairs, from the products [n, D] of their t and u."""
            quadratic = ((products @ self.curvature) * products).sum(1)
            return 2 * (products / self.roots).sum(1) + quadratic - linear + constant

        linear = squares @ diagonal
        # The moments contain the image itself, and half of this second-order effect is in the distance too.
        first = self.first_order(features) - second_order(squares, 2 * linear) / (2 * count)
        pairs = [
            second_order(whitened * whitened.roll(offset, 0), linear + linear.roll(offset, 0))
            for offset in range(1, min(PAIRS_PER_IMAGE, len(features) - 1) + 1)
        ]
        return InfluenceTerms(images.cpu(), first.cpu(), torch.stack(pairs).cpu(), count)
