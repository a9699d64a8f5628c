"""Minibatch optimal transport: noise and data of a block are paired by least squared distance.

Pooladian et al. (2023), "Multisample Flow Matching", and Tong et al. (2024). The plan between two uniform
measures of one size is a permutation, so each block is an assignment problem.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.couplings import Coupling, Paired


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
