"""Kernel distance (KID): the squared maximum mean discrepancy between two sets of features.

The kernel is (x . y / D + 1)^3; the estimate is unbiased, over all pairs, in float64 (Binkowski et al. 2018).
It can be negative.

The distance is a two-sample U-statistic. Its variance over both sets (see `sampling_error`) has the
second-order part

    2 E k~(x, x')² / (N (N - 1)) + 2 E k~(y, y')² / (M (M - 1)) + 4 E k~(x, y)² / (N M),

where k~ is the kernel with its means over either argument subtracted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.data.sources.splits import permutation
from fm_core.evaluation.metrics.sampling_error import SamplingError, heavy_tails

CPU_TILE, DEVICE_TILE = 256, 4_096
"""Rows and columns of the kernel matrix that are computed at a time; those of a CPU stay in its cache."""


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance and its standard error."""

    value: float
    stderr: float
    """Standard deviation over independent pairs of sets, since both sets are random samples."""
    unreliable: str | None = None
    """Why the error is unreliable; None if it is reliable."""


def kernel_distance(x: Tensor, y: Tensor) -> KernelDistance:
    """Unbiased kernel distance of features [N, D] and [M, D], over all pairs of images.

    Raises:
        ValueError: a set has fewer than four images.
    """
    n, m = len(x), len(y)
    if min(n, m) < 4:
        raise ValueError(f"a kernel distance needs at least four images per set, not {n} and {m}")
    xx, yy, xy = _KernelMeans.within(x), _KernelMeans.within(y), _KernelMeans.between(x, y)
    value = xx.rows.mean() + yy.rows.mean() - 2 * xy.rows.mean()
    influences = 2 * (xx.rows - xy.rows), 2 * (yy.rows - xy.columns)
    jackknife = sum(values.var().item() / len(values) for values in influences)
    second = (
        2 * xx.residual / (n * (n - 3))
        + 2 * yy.residual / (m * (m - 3))
        + 4 * xy.residual / ((n - 1) * (m - 1))
    )
    error = SamplingError.of(jackknife, second.item(), heavy_tails(*influences))
    return KernelDistance(value.item(), error.stderr, error.unreliable)


def kernel_distance_of_subsets(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1_000) -> KernelDistance:
    """Mean kernel distance over random subsets, as torch-fidelity and torchmetrics report it.

    The subsets overlap, so the deviation between them, which these packages print next to the mean, is not
    the mean's standard error. The mean over all possible subsets equals the distance over all pairs. The
    variance is the sum of two parts: the variance of that distance, and the variance from drawing only some
    of the subsets.

    Raises:
        ValueError: a set has fewer images than a subset, or a subset fewer than four.
    """
    if min(len(x), len(y)) < size:
        raise ValueError(f"subsets of {size} images need as many per set, not {len(x)} and {len(y)}")
    values = list[float]()
    for number in range(subsets):
        chosen = [permutation(len(rows), 2 * number + side + 1)[:size] for side, rows in enumerate((x, y))]
        part = [rows[torch.from_numpy(ids)] for rows, ids in zip((x, y), chosen, strict=True)]
        values.append(kernel_distance(*part).value)
    drawn = torch.tensor(values, dtype=torch.float64)
    of_draws = drawn.var().item() / subsets if subsets > 1 else 0.0
    complete = kernel_distance(x, y)
    error = (complete.stderr**2 + of_draws) ** 0.5
    return KernelDistance(drawn.mean().item(), error, complete.unreliable)


@dataclass(frozen=True)
class _KernelMeans:
    """Means of the kernel between two sets or within one set."""

    rows: Tensor
    """Mean over the second set for each image of the first, float64 [N]."""
    columns: Tensor
    """Mean over the first set for each image of the second, float64 [M]."""
    residual: Tensor
    """Mean square of the kernel after its row and column means are subtracted."""

    @classmethod
    def within(cls, x: Tensor) -> "_KernelMeans":
        """Compute the means over pairs of distinct images of a set."""
        own = _cube(x.double().square().sum(1) / x.shape[1] + 1)
        count = len(x) - 1
        rows, _, squares = _kernel_sums(x, None)
        return cls._of((rows - own) / count, None, (squares - own.square().sum()) / (len(x) * count))

    @classmethod
    def between(cls, x: Tensor, y: Tensor) -> "_KernelMeans":
        """Compute the means over all pairs of images of two sets."""
        rows, columns, squares = _kernel_sums(x, y)
        return cls._of(rows / len(y), columns / len(x), squares / (len(x) * len(y)))

    @classmethod
    def _of(cls, rows: Tensor, columns: Tensor | None, square: Tensor) -> "_KernelMeans":
        columns = rows if columns is None else columns
        residual = square - rows.square().mean() - columns.square().mean() + rows.mean().square()
        return cls(rows, columns, residual.clamp_min(0))


def _kernel_sums(x: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the kernel for each image of x [N] and of the other set [M], and the sum of its squares.

    Without another set, x itself is the other; half of the symmetric kernel matrix is computed then.
    """
    y = x if other is None else other
    size = CPU_TILE if x.device.type == "cpu" else DEVICE_TILE
    # A product of rows with the column of ones is x . y / D + 1.
    a, b = _with_one(x, scale=1 / x.shape[1]).split(size), _with_one(y).split(size)
    rows = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    columns = rows if other is None else torch.zeros(len(y), dtype=torch.float64, device=x.device)
    row_parts, column_parts = rows.split(size), columns.split(size)
    squares = torch.zeros((), dtype=torch.float64, device=x.device)
    for i, left in enumerate(a):
        for j in range(i if other is None else 0, len(b)):
            kernel = _cube(left @ b[j].T)
            row_parts[i].add_(kernel.sum(1))
            mirrored = other is None and i != j
            if other is not None or mirrored:
                column_parts[j].add_(kernel.sum(0))
            squares += (1 + mirrored) * torch.linalg.vector_norm(kernel) ** 2
    return rows, columns, squares


def _cube(base: Tensor) -> Tensor:
    return (base * base).mul_(base)


def _with_one(rows: Tensor, scale: float = 1.0) -> Tensor:
    """Features in float64 times `scale`, and a column of ones, [N, D + 1]."""
    return torch.cat([rows.double() * scale, rows.new_ones(len(rows), 1, dtype=torch.float64)], dim=1)
