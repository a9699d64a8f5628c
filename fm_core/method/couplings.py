"""Which noise goes with which data.

A coupling pairs x0 with x1, both [N, ...]: it may reorder x0, and leaves x1, its label and its place in the
stream where they are.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fm_core.errors import UserError

Paired = tuple[Tensor, Tensor, Tensor | None]


class Coupling(ABC):
    """A rule of pairing.

    `block` is the number of consecutive stream positions that are paired among themselves. A micro-batch must
    begin at a multiple of it and hold whole blocks: the pairing then does not depend on the number of
    processes.
    """

    name: ClassVar[str]
    block: int = 1

    @abstractmethod
    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> Paired:
        """(x0, x1, label) paired; shapes [N, ...], [N, ...], [N]."""

    def check(self, micro_batch: int, first_position: int = 0) -> None:
        """Refuse a micro-batch that does not hold whole blocks.

        Raises:
            UserError: it does not.
        """
        if micro_batch % self.block or first_position % self.block:
            raise UserError(
                f"{self.name} pairs blocks of {self.block} consecutive examples, so a micro-batch must hold "
                f"whole blocks; one of {micro_batch} beginning at position {first_position} does not"
            )


@dataclass(frozen=True)
class Independent(Coupling):
    """x0 and x1 independent, as in the paper (eq. 14)."""

    name: ClassVar[str] = "independent"

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> Paired:
        """As they came."""
        return x0, x1, label


@dataclass(frozen=True)
class MinibatchOptimalTransport(Coupling):
    """Exact optimal transport inside each block, without replacement (Pooladian et al. 2023).

    Label-blind: with class-conditional data it biases the noise a class sees (torchcfm issue 117).

    Args:
        block: number of consecutive stream positions matched among themselves.
    """

    name: ClassVar[str] = "minibatch-optimal-transport"
    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 2:
            raise UserError(f"{self.name}: block must be at least 2, not {self.block}")

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> Paired:
        """x0 reordered inside each block to make the sum of |x1 - x0|^2 least.

        Raises:
            UserError: N is not a multiple of the block.
        """
        self.check(x1.shape[0])
        order = np.arange(x1.shape[0])
        for start in range(0, x1.shape[0], self.block):
            part = slice(start, start + self.block)
            order[part] = start + _assignment(x0[part], x1[part])
        return x0[torch.from_numpy(order).to(x0.device)], x1, label


def _assignment(x0: Tensor, x1: Tensor) -> np.ndarray:
    """For each x1 of a block [B, ...] the index of its x0."""
    # Summed over a permutation, |x1 - x0|^2 is -2 x1.x0 and a constant. Between uniform measures of one size
    # the optimal plan is a permutation: scipy, a dependency already, finds it exactly, as POT would.
    products = _rows(x1) @ _rows(x0).T
    return linear_sum_assignment(products.numpy(), maximize=True)[1]


def _rows(x: Tensor) -> Tensor:
    """Examples as rows, [B, D] float64 on the CPU."""
    return x.detach().reshape(x.shape[0], -1).double().cpu()
