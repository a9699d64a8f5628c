"""Fréchet distance between two sets of features, with standard error and extrapolation to N = infinity.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64 throughout (Dowson and Landau 1982; Heusel
et al. 2017). The trace of (S1 S2)^(1/2) is computed as the trace of (R S1 R)^(1/2) with R = S2^(1/2), where
R S1 R is symmetric.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.data.sources.splits import permutation
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian, zero_rounding_noise
from fm_core.evaluation.metrics.frechet_error import FrechetInfluence, error_images
from fm_core.evaluation.metrics.sampling_error import InfluenceTerms

RELIABLE_IMAGES = 10
"""Minimum number of images per feature for the standard error to be considered reliable."""
FEW_IMAGES = f"fewer than {RELIABLE_IMAGES} images per feature"
"""Why an error is unreliable with fewer images: it is correct to second order only, and the moments are less
accurate."""
CHUNK_ROWS = 8_192
ORDER_SEED = 1
"""Seed of the permutation of the images from which halves, and the images for an error, are taken."""


@dataclass(frozen=True)
class FrechetEstimate:
    """A Fréchet distance, its standard error, and its limit for N = infinity."""

    value: float
    stderr: float
    """Standard deviation of the distance over independent sets of N images, with the reference held fixed."""
    infinity: tuple[float, float] | None
    """Extrapolation to N = infinity, linear in 1/N (Chong and Forsyth 2020), and its standard error. None if
    half the number of images is at most the number of features."""
    singular: bool
    """Whether there are at most as many images as features, so that the covariance is singular."""
    unreliable: str | None
    """Why the errors are unreliable; None for at least 10 images per feature unless a few images dominate."""
    terms: InfluenceTerms
    """Terms of the error, for errors of differences."""


def frechet_distance(moments: FeatureMoments, reference: Gaussian) -> float:
    """Fréchet distance (squared, like FID) from more than D images to a reference."""
    covariance = moments.covariance
    cross = _root_trace(reference.whiten(covariance))
    return _frechet_formula(moments.mean, covariance.trace(), reference, cross)


def frechet_distance_of_features(features: Tensor, reference: Gaussian) -> float:
    """Fréchet distance from features [N, D] to a reference for any N >= 2, without an error estimate."""
    if len(features) <= features.shape[1]:
        return frechet_distance_low_rank(features, reference)
    return frechet_distance(FeatureMoments.of(features), reference)


def frechet_distance_low_rank(features: Tensor, reference: Gaussian) -> float:
    """Fréchet distance computed directly from features [N, D]: exact for N <= D (singular covariance).

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least two images, not {len(features)}")
    rows = features.double()
    mean = rows.mean(0)
    centered = (rows - mean) / (len(rows) - 1) ** 0.5
    # With S1 = A^T A, the trace is the sum of the singular values of A R: no square root of a rounded zero.
    cross = torch.linalg.svdvals(centered @ reference.root).sum()
    return _frechet_formula(mean, centered.square().sum(), reference, cross)


def estimate_frechet_distance(
    features: Tensor, reference: Gaussian, *, limit: bool = True
) -> FrechetEstimate:
    """Fréchet distance from features [N, D] to a reference, with the error of `FrechetInfluence`.

    The cost is dominated by the moments, N D², and one eigendecomposition of a [D, D] matrix. The limit is
    computed if `limit` is set and half the number of images exceeds the number of features; it needs the
    eigenvalues of two more [D, D] matrices, one for each half of a fixed permutation of the images.

    Raises:
        ValueError: fewer than four images.
    """
    count, dimension = features.shape
    if count < 4:
        raise ValueError(f"a distance and its error need at least four images, not {count}")
    order = torch.from_numpy(permutation(count, ORDER_SEED)).to(features.device)
    halves = [_moments(features, part) for part in order.tensor_split(2)]
    moments = halves[0] + halves[1]
    covariance = moments.covariance
    whitened = reference.whiten(covariance)
    influence = FrechetInfluence(moments.mean, whitened, reference)
    singular = count <= dimension
    value = (
        frechet_distance_low_rank(features, reference)
        if singular
        else _frechet_formula(moments.mean, covariance.trace(), reference, influence.cross)
    )
    chosen = order[: error_images(count, dimension)]
    terms = influence.terms(features[chosen], chosen, count)
    error = terms.error()
    infinity = None
    if limit and count > 2 * dimension:
        half = sum(_distances_of_halves(halves, whitened, reference)) / 2
        # The limit F of the line F(N) = F + c / N. The halves add their own second-order part to its error.
        infinity = (2 * value - half, (error.variance + error.second_order) ** 0.5)
    return FrechetEstimate(
        value=value,
        stderr=error.stderr,
        infinity=infinity,
        singular=singular,
        unreliable=FEW_IMAGES if count < RELIABLE_IMAGES * dimension else error.unreliable,
        terms=terms,
    )


def _moments(features: Tensor, chosen: Tensor) -> FeatureMoments:
    """Moments of the chosen rows of features, without a float64 copy of all rows."""
    first, *rest = (FeatureMoments.of(features[part]) for part in chosen.split(CHUNK_ROWS))
    return sum(rest, first)


def _distances_of_halves(
    halves: Sequence[FeatureMoments], whitened: Tensor, reference: Gaussian
) -> Iterator[float]:
    """Fréchet distances of two halves, where R S R of both together is `whitened` [D, D].

    (n - 1) S = (n1 - 1) S1 + (n2 - 1) S2 + n1 n2 / n (m1 - m2) (m1 - m2)^T, so that the second half needs no
    products of its own.
    """
    first, second = halves
    count = first.count + second.count
    own = reference.whiten(first.covariance)
    between = reference.root @ (first.mean - second.mean)
    rest = (count - 1) * whitened - (first.count - 1) * own
    rest -= first.count * second.count / count * torch.outer(between, between)
    for half, product in ((first, own), (second, rest / (second.count - 1))):
        yield _frechet_formula(half.mean, half.covariance.trace(), reference, _root_trace(product))


def _root_trace(whitened: Tensor) -> Tensor:
    """Trace of the square root of a positive semidefinite matrix [D, D]."""
    return zero_rounding_noise(torch.linalg.eigvalsh(whitened)).sqrt().sum()


def _frechet_formula(mean: Tensor, trace: Tensor, reference: Gaussian, cross: Tensor) -> float:
    difference = mean - reference.mean
    squared = difference @ difference + trace + reference.covariance.trace() - 2 * cross
    return max(0.0, squared.item())
