"""Which noise goes with which data.

A coupling pairs x0 with x1, both [N, ...]: it may reorder x0, and leaves x1, its label and its place in the
stream where they are.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

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
