"""Precision and recall by k-nearest neighbors (Kynkäänniemi et al. 2019), and duplicate images.

The standard errors come from random halves. Both sets are split in two, and each score is computed once from
the first halves and once from the second halves. The variance is a quarter of the squared difference between
the two values, averaged over random splits, because half as many images have twice the variance. The balls
of each half are built from the images of that half only, so that the error covers their randomness too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.data.sources.splits import permutation

NEIGHBORS = 3
"""k, as in Kynkäänniemi et al. (2019)."""
CPU_ROWS, DEVICE_ROWS = 256, 1_024
"""Rows of distances that are in memory at a time."""
HALVINGS = 40
"""Number of splits of both sets into halves, by fixed permutations; the error is accurate to about 11%."""
TOO_FEW = "too few images for halves: binomial, for fixed balls"
NEAREST = 40
"""Number of nearest neighbors of an image among which its k neighbors in its own half are looked up; fewer
than k of them are in that half in one case in 10^9."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall, each with its standard error over independent pairs of sets, both random."""

    precision: float
    """Fraction of samples in the ball of at least one real image; the radius of a ball is the distance to the
    k-th nearest other real image."""
    precision_stderr: float
    recall: float
    """Fraction of real images in the ball of at least one sample; the radius of a ball is the distance to the
    k-th nearest other sample."""
    recall_stderr: float
    unreliable: str | None = None
    """Why the errors are unreliable; None if they are reliable."""


def precision_and_recall(samples: Tensor, real: Tensor, k: int = NEIGHBORS) -> PrecisionRecall:
    """Precision and recall of features [N, D] relative to features of real images [M, D].

    Both depend on the numbers of images. At most DEVICE_ROWS rows of distances are in memory.

    Raises:
        ValueError: a set has at most k images.
    """
    if min(len(samples), len(real)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images per set, not {len(samples)} and {len(real)}"
        )
    halvings = HALVINGS if min(len(samples), len(real)) >= 2 * (k + 1) else 0
    of_samples, of_real = (_Balls.of(rows, k, halvings, side) for side, rows in enumerate((samples, real)))
    precision, precision_error = of_real.coverage(of_samples)
    recall, recall_error = of_samples.coverage(of_real)
    unreliable = None if halvings else TOO_FEW
    return PrecisionRecall(precision, precision_error, recall, recall_error, unreliable)


def duplicates(digests: Tensor) -> int:
    """Number of images that are identical to an earlier one, from digests int64 [N] of their pixels."""
    return len(digests) - len(torch.unique(digests))


@dataclass(frozen=True)
class _Balls:
    """Balls around the images of a set that extend to the k-th nearest other image, also within halves."""

    centers: Tensor
    """Features [N, D]."""
    radii: Tensor
    """Radii with neighbors from all images, float64 [N]."""
    sides: Tensor
    """Half to which each image belongs in each split, bool [splits, N]."""
    half_radii: Tensor
    """Radii with neighbors from the same half, float64 [splits, N]."""

    @classmethod
    def of(cls, rows: Tensor, k: int, halvings: int, set_number: int) -> "_Balls":
        """Split a set into halves and compute the radii; `set_number` selects the set's own permutations."""
        count, device = len(rows), rows.device
        sides = torch.zeros(halvings, count, dtype=torch.bool, device=device)
        for cut in range(halvings):
            order = torch.from_numpy(permutation(count, seed=2 * cut + set_number))
            sides[cut, order[: count // 2].to(device)] = True
        radii = torch.empty(count, dtype=torch.float64, device=device)
        half_radii = torch.empty(halvings, count, dtype=torch.float64, device=device)
        first = 0
        for distances in _distances(rows, rows):
            part = slice(first, first + len(distances))
            # The nearest image is the image itself or a copy of it.
            nearest, ids = distances.topk(min(NEAREST, count), largest=False, sorted=True)
            radii[part] = nearest[:, k]
            for cut in range(halvings):
                own_half = sides[cut, ids] == sides[cut, part, None]
                position = (own_half.cumsum(1) <= k).sum(1).clamp_max(nearest.shape[1] - 1)
                half_radii[cut, part] = nearest.gather(1, position[:, None])[:, 0]
            first += len(distances)
        return cls(rows, radii, sides, half_radii)

    def coverage(self, points: "_Balls") -> tuple[float, float]:
        """Fraction of the points within at least one ball, and its standard error."""
        largest = torch.cat([self.radii[None], self.half_radii]).amax(0)
        cuts, count, covered = len(self.sides), len(points.centers), 0
        in_half = torch.zeros(cuts, 2, dtype=torch.float64, device=largest.device)
        first = 0
        for distances in _distances(points.centers, self.centers):
            covered += int((distances <= self.radii).any(1).sum())
            # Few pairs are close enough to matter in any split.
            point, center = (distances <= largest).nonzero(as_tuple=True)
            close = distances[point, center]
            for cut in range(cuts):
                side = points.sides[cut, first : first + len(distances)]
                inside = (close <= self.half_radii[cut, center]) & (side[point] == self.sides[cut, center])
                hit = torch.zeros(len(distances), dtype=torch.bool, device=largest.device)
                hit[point[inside]] = True
                in_half[cut] += torch.stack([(hit & ~side).sum(), (hit & side).sum()])
            first += len(distances)
        share = covered / count
        if not cuts:
            return share, math.sqrt(share * (1 - share) / count)
        sizes = torch.tensor([count - count // 2, count // 2], device=largest.device)
        difference = (in_half / sizes).diff(dim=1)
        return share, (difference.square().mean().sqrt() / 2).item()


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Pairwise distances, float64, in chunks [n, M] of the rows of a."""
    b, size = b.double(), CPU_ROWS if a.device.type == "cpu" else DEVICE_ROWS
    return (torch.cdist(rows.double(), b) for rows in a.split(size))
