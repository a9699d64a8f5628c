"""Minibatch optimal transport: pairing noise and data within a block by least total squared distance.

Pooladian et al. (2023), "Multisample Flow Matching", and Tong et al. (2024). The optimal plan between
two uniform measures of equal size is a permutation, so each block is an assignment problem.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.couplings import Coupling, PairedBatch


@dataclass(frozen=True)
class MinibatchOptimalTransport(Coupling):
    """Exact optimal transport inside each block, without replacement (Pooladian et al. 2023).

    It ignores labels: with class-conditional data this biases the noise that each class is paired with
    (torchcfm issue 117).

    Args:
        block: number of consecutive stream positions paired among themselves.

    Raises:
        UserError: block is below 2.
    """

    name: ClassVar[str] = "minibatch-optimal-transport"
    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 2:
            raise UserError(f"{self.name}: block must be at least 2, not {self.block}")

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> PairedBatch:
        """Reorder x0 within each block to minimize the sum of |x1 - x0|^2.

        Raises:
            UserError: N is not a multiple of the block.
        """
        return x0[self.noise_order(x0, x1, label)], x1, label

    def noise_order(self, x0: Tensor, x1: Tensor, label: Tensor | None = None) -> Tensor:
        """The index of the x0 that is paired with each x1, int64 [N]; raises UserError as `pair`."""
        self.check(x1.shape[0])
        order = np.arange(x1.shape[0])
        for start in range(0, x1.shape[0], self.block):
            part = slice(start, start + self.block)
            order[part] = start + _assignment(x0[part], x1[part])
        return torch.from_numpy(order).to(x0.device)


def _assignment(x0: Tensor, x1: Tensor) -> np.ndarray:
    """For each x1 of a block [B, ...], the index of the x0 assigned to it."""
    # Summed over a permutation, |x1 - x0|^2 is -2 x1.x0 plus a constant. The optimal plan between uniform
    # measures of equal size is a permutation: scipy, already a dependency, finds it exactly, as POT would.
    products = _flat_rows(x1) @ _flat_rows(x0).T
    return linear_sum_assignment(products.numpy(), maximize=True)[1]


def _flat_rows(x: Tensor) -> Tensor:
    """Examples as rows, [B, D] float64 on the CPU."""
    return x.detach().reshape(x.shape[0], -1).double().cpu()
