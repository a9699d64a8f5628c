"""Minibatch optimal transport: pairing of noise and data in a block with the least total squared distance.

Pooladian et al. (2023), "Multisample Flow Matching", and Tong et al. (2024). The optimal plan between
two uniform measures of equal size is a permutation, so each block is an assignment problem.

Sampling a class-conditional model starts from N(0, s^2 I) for every class, so the noise paired with each
class in training must have this distribution too. Cheng and Schwing (2025), "The Curse of Conditions", show
that the plain assignment violates this, and add a cost for changing the condition.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.couplings import Coupling, PairedBatch


@dataclass(frozen=True)
class MinibatchOptimalTransport(Coupling):
    """Exact optimal transport inside each block, without replacement (Pooladian et al. 2023).

    It ignores labels, which shifts the noise paired with each class: for two classes at -0.5 and 0.5 with
    standard deviation 0.1, and blocks of 64, the mean of this noise is -0.79 and 0.79 instead of 0. A
    class-conditional model needs one of the subclasses.

    Args:
        block: number of consecutive stream positions paired among themselves.

    Raises:
        UserError: block is below 2.
    """

    name: ClassVar[str] = "minibatch-optimal-transport"
    ignores_labels: ClassVar[bool] = True
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
        """The index of the x0 that is paired with each x1, int64 [N]; raises UserError like `pair`."""
        self.check(x1.shape[0])
        order = np.arange(x1.shape[0])
        for start in range(0, x1.shape[0], self.block):
            part = slice(start, start + self.block)
            labels = None if label is None else label[part].cpu().numpy()
            order[part] = start + self._assign(_flat_rows(x0[part]), _flat_rows(x1[part]), labels)
        return torch.from_numpy(order).to(x0.device)

    def _assign(self, x0: np.ndarray, x1: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """For each x1 of a block [B, D], the index of the x0 [B, D] assigned to it; labels [B]."""
        return _assignment(x0, x1)


@dataclass(frozen=True)
class ClassOptimalTransport(MinibatchOptimalTransport):
    """Exact optimal transport inside each class of a block.

    Each image is drawn with its own noise, which is permuted only among images of the same class, so the
    noise of each class stays N(0, s^2 I). Without labels this equals `MinibatchOptimalTransport`.
    """

    name: ClassVar[str] = "class-optimal-transport"
    ignores_labels: ClassVar[bool] = False

    def _assign(self, x0: np.ndarray, x1: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        if labels is None:
            return _assignment(x0, x1)
        order = np.arange(len(x1))
        for number in np.unique(labels):
            members = np.flatnonzero(labels == number)
            order[members] = members[_assignment(x0[members], x1[members])]
        return order


@dataclass(frozen=True)
class ConditionalOptimalTransport(MinibatchOptimalTransport):
    """C2OT (Cheng and Schwing 2025): optimal transport with a cost for changing the class.

    Noise that was drawn for an image of class c may be assigned to an image of class d at the cost
    |x1 - x0|^2 + weight m [c != d], where m is the mean of |x1 - x0|^2 over the block. For classes the paper
    uses an infinite weight, which gives the assignment of `ClassOptimalTransport`. A finite weight shifts the
    noise of each class; larger weights shift it less. Without labels this equals `MinibatchOptimalTransport`.

    Args:
        block: number of consecutive stream positions paired among themselves.
        weight: positive; None means infinite.

    Raises:
        UserError: block is below 2, or the weight is not positive.
    """

    name: ClassVar[str] = "conditional-optimal-transport"
    ignores_labels: ClassVar[bool] = False
    weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None and not self.weight > 0:
            raise UserError(f"{self.name}: weight must be positive, not {self.weight:g}")

    def _assign(self, x0: np.ndarray, x1: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        if labels is None:
            return _assignment(x0, x1)
        distances = (x1**2).sum(1)[:, None] + (x0**2).sum(1)[None] - 2 * x1 @ x0.T
        # Larger than any possible gain in distance, yet small enough for float64 to resolve the distances.
        weight = distances.max() * len(x1) if self.weight is None else distances.mean() * self.weight
        changed = labels[:, None] != labels[None]
        return _cheapest(distances + weight * changed)


def _assignment(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
    """For each x1 [B, D], the index of the x0 [B, D] assigned to it."""
    # Summed over a permutation, |x1 - x0|^2 is -2 x1.x0 plus a constant. The optimal plan between uniform
    # measures of equal size is a permutation: scipy, already a dependency, finds it exactly, as POT would.
    return _cheapest(-x1 @ x0.T)


def _cheapest(costs: np.ndarray) -> np.ndarray:
    """For each row of [B, B] costs, the column assigned to it, with the least total."""
    # Imported here, because it takes a third of a second and only these couplings need it.
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(costs)[1]


def _flat_rows(x: Tensor) -> np.ndarray:
    """Examples as rows, [B, D] float64 on the CPU."""
    return x.detach().reshape(x.shape[0], -1).double().cpu().numpy()
