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
CPU_ROWS, DEVICE_ROWS = 128, 1_024
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
    in_real, in_samples = _Coverage.of(of_samples), _Coverage.of(of_real)
    own, limit, first = of_samples.largest()[:, None], of_real.largest(), 0
    for squares in _squared_distances(samples, real):
        # Few pairs are close enough to matter in any split.
        largest = torch.maximum(own[first : first + len(squares)], limit)
        sample, image = (squares <= largest).nonzero(as_tuple=True)
        close = squares[sample, image]
        sample += first
        in_real.add(sample, image, close, of_samples, of_real)
        in_samples.add(image, sample, close, of_real, of_samples)
        first += len(squares)
    precision, precision_error = in_real.score()
    recall, recall_error = in_samples.score()
    unreliable = None if halvings else TOO_FEW
    return PrecisionRecall(precision, precision_error, recall, recall_error, unreliable)


def duplicates(digests: Tensor) -> int:
    """Number of images that are identical to an earlier one, from digests int64 [N] of their pixels."""
    return len(digests) - len(torch.unique(digests))


@dataclass(frozen=True)
class _Balls:
    """Balls around the images of a set that extend to the k-th nearest other image, also within halves."""

    squared_radii: Tensor
    """Squares of the radii with neighbors from all images, float64 [N]."""
    sides: Tensor
    """Half to which each image belongs in each split, bool [splits, N]."""
    squared_half_radii: Tensor
    """Squares of the radii with neighbors from the same half, float64 [splits, N]."""

    @classmethod
    def of(cls, rows: Tensor, k: int, halvings: int, set_number: int) -> "_Balls":
        """Split a set into halves and compute the radii; `set_number` selects the set's own permutations."""
        count, device = len(rows), rows.device
        sides = torch.zeros(halvings, count, dtype=torch.bool, device=device)
        for cut in range(halvings):
            order = torch.from_numpy(permutation(count, seed=2 * cut + set_number))
            sides[cut, order[: count // 2].to(device)] = True
        squared_radii = torch.empty(count, dtype=torch.float64, device=device)
        squared_half_radii = torch.empty(halvings, count, dtype=torch.float64, device=device)
        first = 0
        for squares in _squared_distances(rows, rows):
            part = slice(first, first + len(squares))
            # The nearest image is the image itself or a copy of it.
            nearest, ids = squares.topk(min(NEAREST, count), largest=False, sorted=True)
            squared_radii[part] = nearest[:, k]
            for cut in range(halvings):
                own_half = sides[cut, ids] == sides[cut, part, None]
                position = (own_half.cumsum(1) <= k).sum(1).clamp_max(nearest.shape[1] - 1)
                squared_half_radii[cut, part] = nearest.gather(1, position[:, None])[:, 0]
            first += len(squares)
        return cls(squared_radii, sides, squared_half_radii)

    def largest(self) -> Tensor:
        """The largest of the squared radii of each ball, float64 [N]."""
        return torch.cat([self.squared_radii[None], self.squared_half_radii]).amax(0)


@dataclass(frozen=True)
class _Coverage:
    """Which images of a set lie in a ball of the other set, among all images and in each split's halves."""

    inside: Tensor
    """bool [N]."""
    inside_half: Tensor
    """Whether the ball is of an image in the same half of its set, bool [splits, N]."""
    sides: Tensor
    """Half to which each image belongs in each split, bool [splits, N]."""

    @classmethod
    def of(cls, points: _Balls) -> "_Coverage":
        """No image is in a ball yet."""
        inside = torch.zeros_like(points.squared_radii, dtype=torch.bool)
        return cls(inside, torch.zeros_like(points.sides), points.sides)

    def add(self, point: Tensor, center: Tensor, squares: Tensor, points: _Balls, balls: _Balls) -> None:
        """Record pairs of an image and the center of a ball, by number, with their squared distances."""
        self.inside[point[squares <= balls.squared_radii[center]]] = True
        for cut in range(len(self.sides)):
            same = points.sides[cut, point] == balls.sides[cut, center]
            self.inside_half[cut, point[same & (squares <= balls.squared_half_radii[cut, center])]] = True

    def score(self) -> tuple[float, float]:
        """Fraction of the images that lie in a ball, and its standard error."""
        count = len(self.inside)
        share = int(self.inside.sum()) / count
        if not len(self.sides):
            return share, math.sqrt(share * (1 - share) / count)
        halves = torch.stack([(self.inside_half & side).sum(1) for side in (~self.sides, self.sides)])
        sizes = torch.tensor([[count - count // 2], [count // 2]], device=halves.device)
        difference = (halves / sizes.double()).diff(dim=0)
        return share, (difference.square().mean().sqrt() / 2).item()


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Squares of pairwise distances, float64, in chunks [n, M] of the rows of a.

    They are computed as |a|² + |b|² - 2 a . b by one product of matrices, with an error of about 2e-15 |a|².
    """
    b = b.double()
    squares, ones = b.square().sum(1, keepdim=True), b.new_ones(len(b), 1)
    columns = torch.cat([-2 * b, squares, ones], dim=1).T
    for rows in a.split(CPU_ROWS if a.device.type == "cpu" else DEVICE_ROWS):
        rows = rows.double()
        own, one = rows.square().sum(1, keepdim=True), rows.new_ones(len(rows), 1)
        yield (torch.cat([rows, one, own], dim=1) @ columns).clamp_min_(0)
