"""Couplings: the joint distribution of noise x0 and data x1.

A coupling pairs x0 with x1, both [N, ...]. It may reorder x0, but not x1, the labels or the stream positions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.paths import Path

PairedBatch = tuple[Tensor, Tensor, Tensor | None]


class Coupling(ABC):
    """Base class of couplings; `name` identifies the coupling in configuration files.

    `block` is the number of consecutive stream positions that are paired among themselves. A micro-batch must
    begin at a multiple of `block` and hold complete blocks, so that the pairing does not depend on the number
    of processes.
    """

    name: ClassVar[str]
    ignores_labels: ClassVar[bool] = False
    """Whether it pairs by the data regardless of labels, so that a class's noise is not N(0, s^2 I)."""
    reorders_noise: ClassVar[bool] = True
    """Whether `noise_order` has to be called with each batch."""
    block: int = 1

    @abstractmethod
    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> PairedBatch:
        """Return the paired batch (x0, x1, label), of shapes [N, ...], [N, ...] and [N]."""

    def noise_order(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> Tensor | None:
        """The pairing as indices, int64 [N]: `pair` returns x0[noise_order]. None if x0 is not reordered.

        Training needs only these indices, because the noise of each image is regenerated on its device. The
        default implementation looks up in x0 the rows that `pair` returns.

        Raises:
            UserError: `pair` returns a row that is not in x0.
        """
        paired = self.pair(x0, x1, label)[0]
        places = {row.tobytes(): place for place, row in enumerate(x0.cpu().numpy())}
        rows = [row.tobytes() for row in paired.cpu().numpy()]
        if any(row not in places for row in rows):
            raise UserError(f"{self.name}: the coupling changes x0; it may only reorder it")
        return torch.tensor([places[row] for row in rows], device=x0.device)

    def check_path(self, path: Path) -> None:
        """Refuse a path on which the coupling is invalid; the base class accepts all. Raises UserError."""
        return

    def check(self, micro_batch: int, first_position: int = 0) -> None:
        """Refuse a micro-batch that does not consist of complete blocks.

        Raises:
            UserError: its size or first position is not a multiple of `block`.
        """
        if micro_batch % self.block or first_position % self.block:
            raise UserError(
                f"{self.name} pairs blocks of {self.block} consecutive examples: the size and first position "
                f"of a micro-batch must be multiples of {self.block}, not {micro_batch} at position "
                f"{first_position}"
            )


@dataclass(frozen=True)
class Independent(Coupling):
    """x0 and x1 independent, as in the paper (eq. 14)."""

    name: ClassVar[str] = "independent"
    reorders_noise: ClassVar[bool] = False

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> PairedBatch:
        """Return the arguments unchanged."""
        return x0, x1, label

    def noise_order(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> None:
        """Always None: x0 is not reordered."""


@dataclass(frozen=True)
class Reflow(Coupling):
    """x1 is the sample that a trained model made of x0 (rectified flow, Liu et al. 2022, arXiv 2209.03003).

    The pairs are those of a sample set (data.pairs). On the straight line between the two the velocity of a
    pair is constant, and the lines of different pairs cross less with every round, so that fewer steps of a
    solver suffice. The marginals of the model that made them are kept.
    """

    name: ClassVar[str] = "reflow"
    reorders_noise: ClassVar[bool] = False

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> PairedBatch:
        """Return the arguments unchanged: they are pairs already."""
        return x0, x1, label

    def noise_order(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> None:
        """Always None: x0 is not reordered."""

    def check_path(self, path: Path) -> None:
        """Refuse a path that does not begin at noise alone, because x0 and x1 are dependent.

        Raises:
            UserError: alpha_t is not zero at the start of the path's interval.
        """
        start = torch.tensor(path.interval[0], dtype=torch.float64)
        if float(path.alpha(start)) > 1e-6:
            raise UserError(
                f"{self.name} cannot be used on the path {path.name or type(path).__name__}: at t = "
                f"{float(start):g} it is not at the noise of its pairs; use optimal-transport"
            )
