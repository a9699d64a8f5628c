"""Agreement of all ranks on what follows a step, by one reduction that no step waits for.

The reduction is started before the last backward pass of a step and read after its update: its latency, which
grows with the number of ranks, is hidden behind the backward pass, and all ranks still act after the same
step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fm_core.launch.worker_main import Rank


class StepAgreement:
    """Whether any rank was asked to stop, or writes a checkpoint, before the last backward pass of a step."""

    def __init__(self, rank: Rank, writes: Callable[[], bool], group: Any) -> None:
        """`writes`: whether this rank still writes a checkpoint.

        `group` is a gloo process group, whose collectives run in threads of its own.
        """
        self._rank, self._writes, self._group = rank, writes, group
        self._flags = torch.zeros(2, dtype=torch.uint8)
        self._work: Any = None

    def start(self) -> None:
        """Start the reduction for this step; all ranks must call it once per step."""
        self._flags[0] = int(self._rank.stop_requested())
        self._flags[1] = int(self._writes())
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any writes; all ranks get the same."""
        self._work.wait()
        stop, writes = self._flags.tolist()
        return bool(stop), bool(writes)
