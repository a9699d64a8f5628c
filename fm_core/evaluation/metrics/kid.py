"""The kernel distance (KID): the squared maximum mean discrepancy of two sets of features.

Kernel (x . y / D + 1)^3, all pairs, unbiased, float64 (Binkowski et al. 2018). It may be negative.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.evaluation.metrics.frechet import JACKKNIFE_BLOCKS, jackknife_error

CHUNK_ROWS = 2_048
"""Rows of the kernel matrix that are in memory at a time."""


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance and its standard error."""

    value: float
    stderr: float
    """By leaving out one block of images at a time on either side: both sets are samples."""


def kernel_distance(x: Tensor, y: Tensor, blocks: int = JACKKNIFE_BLOCKS) -> KernelDistance:
    """The unbiased estimate from features [N, D] and [M, D], with a jackknife over blocks of images.

    Image i of a set is in block i mod `blocks`. Raises ValueError for fewer than four images in a set.
    """
    if min(len(x), len(y)) < 4:
        raise ValueError(f"a kernel distance needs at least four images a side, not {len(x)} and {len(y)}")
    blocks = min(blocks, len(x) // 2, len(y) // 2)
    xx, yy, xy = _within(x, blocks), _within(y, blocks), _block_sums(x, y, blocks)
    n, m = _sizes(len(x), blocks), _sizes(len(y), blocks)
    every = torch.ones(blocks, dtype=torch.float64)
    each = [every - row for row in torch.eye(blocks, dtype=torch.float64)]

    def estimate(of_x: Tensor, of_y: Tensor) -> float:
        count, other = of_x @ n, of_y @ m
        within = of_x @ xx @ of_x / (count * (count - 1)) + of_y @ yy @ of_y / (other * (other - 1))
        return (within - 2 * (of_x @ xy @ of_y) / (count * other)).item()

    of_x = jackknife_error([estimate(without, every) for without in each])
    of_y = jackknife_error([estimate(every, without) for without in each])
    return KernelDistance(estimate(every, every), (of_x**2 + of_y**2) ** 0.5)


def _within(x: Tensor, blocks: int) -> Tensor:
    """Sums over pairs of different images of one set, by their blocks, [B, B]."""
    sums = _block_sums(x, x, blocks)
    own = _kernel((x.double().square()).sum(1), x.shape[1]).cpu()
    number = torch.arange(len(x)) % blocks
    diagonal = torch.zeros(blocks, dtype=torch.float64).index_add_(0, number, own)
    return sums - torch.diag(diagonal)


def _block_sums(x: Tensor, y: Tensor, blocks: int) -> Tensor:
    """Sums of the kernel over pairs of images, by their blocks, float64 [B, B] on the CPU."""
    sums = torch.zeros(blocks, blocks, dtype=torch.float64, device=x.device)
    others, where = y.double(), torch.arange(len(y), device=x.device) % blocks
    for first in range(0, len(x), CHUNK_ROWS):
        rows = x[first : first + CHUNK_ROWS].double()
        kernel = _kernel(rows @ others.T, x.shape[1])
        by_column = torch.zeros(len(rows), blocks, dtype=torch.float64, device=x.device)
        by_column.index_add_(1, where, kernel)
        sums.index_add_(0, (first + torch.arange(len(rows), device=x.device)) % blocks, by_column)
    return sums.cpu()


def _kernel(products: Tensor, dimension: int) -> Tensor:
    return (products / dimension + 1).pow(3)


def _sizes(count: int, blocks: int) -> Tensor:
    return torch.bincount(torch.arange(count) % blocks, minlength=blocks).double()
