"""Kernel distance (KID): the squared maximum mean discrepancy between two sets of features.

Kernel (x . y / D + 1)^3, unbiased over all pairs, float64 (Binkowski et al. 2018). It can be negative.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.evaluation.metrics.frechet import JACKKNIFE_BLOCKS, jackknife_error

CHUNK_ROWS = 2_048
"""Rows of the kernel matrix in memory at a time."""


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance and its standard error."""

    value: float
    stderr: float
    """By the delete-a-block jackknife over both sets, as both are samples."""


def kernel_distance(x: Tensor, y: Tensor, blocks: int = JACKKNIFE_BLOCKS) -> KernelDistance:
    """Unbiased kernel distance of features [N, D] and [M, D], with a jackknife over blocks of images.

    Image i of a set is in block i mod `blocks`.

    Raises:
        ValueError: a set has fewer than four images.
    """
    if min(len(x), len(y)) < 4:
        raise ValueError(f"a kernel distance needs at least four images per set, not {len(x)} and {len(y)}")
    blocks = min(blocks, len(x) // 2, len(y) // 2)
    xx, yy, xy = _within_sums(x, blocks), _within_sums(y, blocks), _block_sums(x, y, blocks)
    n, m = _block_sizes(len(x), blocks), _block_sizes(len(y), blocks)
    all_blocks = torch.ones(blocks, dtype=torch.float64)
    all_but_one = [all_blocks - row for row in torch.eye(blocks, dtype=torch.float64)]

    def estimate(of_x: Tensor, of_y: Tensor) -> float:
        count, other = of_x @ n, of_y @ m
        within = of_x @ xx @ of_x / (count * (count - 1)) + of_y @ yy @ of_y / (other * (other - 1))
        return (within - 2 * (of_x @ xy @ of_y) / (count * other)).item()

    of_x = jackknife_error([estimate(without, all_blocks) for without in all_but_one])
    of_y = jackknife_error([estimate(all_blocks, without) for without in all_but_one])
    return KernelDistance(estimate(all_blocks, all_blocks), (of_x**2 + of_y**2) ** 0.5)


def _within_sums(x: Tensor, blocks: int) -> Tensor:
    """Sums of the kernel over pairs of distinct images of one set, by block, [B, B]."""
    sums = _block_sums(x, x, blocks)
    own = _kernel((x.double().square()).sum(1), x.shape[1]).cpu()
    number = torch.arange(len(x)) % blocks
    diagonal = torch.zeros(blocks, dtype=torch.float64).index_add_(0, number, own)
    return sums - torch.diag(diagonal)


def _block_sums(x: Tensor, y: Tensor, blocks: int) -> Tensor:
    """Sums of the kernel over pairs of images, by block, float64 [B, B] on the CPU."""
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


def _block_sizes(count: int, blocks: int) -> Tensor:
    return torch.bincount(torch.arange(count) % blocks, minlength=blocks).double()
