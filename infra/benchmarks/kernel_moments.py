"""The kernel distance of many images with few features, from moments of third order.

The kernel (x . y / D + 1)^3 is the product of the third tensor powers of [x / sqrt(D), 1] and [y / sqrt(D),
1]. Its mean over all pairs of N and M images is therefore a product of two moments: (N + M) D^3 / 3
multiplications instead of (N^2 + M^2) D / 2 + N M D. `score_errors.py` uses it for sets of 50,000 images.
The value is that of `kernel_distance` to rounding. Its error is computed as there, but the variances over
the first images instead of all, so that a few more sets may be labeled unreliable.
"""

import torch
from torch import Tensor

from fm_core.evaluation.metrics.kid import KernelDistance
from fm_core.evaluation.metrics.sampling_error import SamplingError, heavy_tails

INFLUENCE_IMAGES, RESIDUAL_IMAGES = 8_192, 2_048
"""Images of each set over which the two variances of the error are computed."""
CHUNK = 4_096


def kernel_distance_by_moments(x: Tensor, y: Tensor) -> KernelDistance:
    """`kernel_distance` of features [N, D] and [M, D]; D^3 / 3 multiplications per image."""
    n, m = len(x), len(y)
    a, b = _lifted(x), _lifted(y)
    moments_a, moments_b = _moments(a), _moments(b)
    own_a, own_b = (rows.square().sum(1) ** 3 for rows in (a, b))
    value = (
        (_product(moments_a, moments_a) - own_a.sum()) / (n * (n - 1))
        + (_product(moments_b, moments_b) - own_b.sum()) / (m * (m - 1))
        - 2 * _product(moments_a, moments_b) / (n * m)
    )
    influences = [
        2 * ((_means(rows[:INFLUENCE_IMAGES], moments) - own[:INFLUENCE_IMAGES]) / (len(rows) - 1) - others)
        for rows, moments, own, others in (
            (a, moments_a, own_a, _means(a[:INFLUENCE_IMAGES], moments_b) / m),
            (b, moments_b, own_b, _means(b[:INFLUENCE_IMAGES], moments_a) / n),
        )
    ]
    jackknife = influences[0].var().item() / n + influences[1].var().item() / m
    second = 2 * _residual(a, a) / n**2 + 2 * _residual(b, b) / m**2 + 4 * _residual(a, b) / (n * m)
    error = SamplingError.of(jackknife, second, heavy_tails(*influences))
    return KernelDistance(value.item(), error.stderr, error.unreliable)


def _lifted(rows: Tensor) -> Tensor:
    """[x / sqrt(D), 1] in float64, [N, D + 1]."""
    scaled = rows.double() / rows.shape[1] ** 0.5
    return torch.cat([scaled, scaled.new_ones(len(rows), 1)], dim=1)


def _moments(rows: Tensor) -> list[Tensor]:
    """Sums over images of x_i x_j x_k for j, k >= i: one matrix [D - i, D - i] for each i."""
    count = rows.shape[1]
    sums = [rows.new_zeros(count - i, count - i) for i in range(count)]
    for chunk in rows.split(CHUNK):
        for i, total in enumerate(sums):
            total.addmm_((chunk[:, i:] * chunk[:, i, None]).T, chunk[:, i:])
    return sums


def _weighted(moment: Tensor) -> Tensor:
    """Moments times the number of permutations of their indices over the number of their entries."""
    weights = torch.full_like(moment, 3.0)
    weights[0], weights[:, 0] = 1.5, 1.5
    weights[0, 0] = 1.0
    return weights * moment


def _product(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Sum of the kernel over all pairs of two sets."""
    products = [(_weighted(a) * b).sum() for a, b in zip(one, other, strict=True)]
    return torch.stack(products).sum()


def _means(rows: Tensor, moments: list[Tensor]) -> Tensor:
    """Sum of the kernel over the images of the moments, for each row."""
    sums = rows.new_zeros(len(rows))
    for i, moment in enumerate(moments):
        part = rows[:, i:]
        sums += rows[:, i] * ((part @ _weighted(moment)) * part).sum(1)
    return sums


def _residual(one: Tensor, other: Tensor) -> float:
    """Mean square of the kernel after its row and column means are subtracted, over different images."""
    size = min(RESIDUAL_IMAGES, len(one) // 2, len(other) // 2)
    kernel = (one[:size] @ other[size : 2 * size].T) ** 3
    centered = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    return centered.square().sum().item() / (size - 1) ** 2
