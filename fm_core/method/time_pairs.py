"""Pairs of times t <= s for the training of flow maps, from uniform numbers keyed by stream position."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fm_core.method.timestep_samplers import TimestepSampler

NUMBERS = 3
"""Uniform numbers per example, besides the one that determines the time of a plain objective."""


@dataclass(frozen=True)
class SecondTimes:
    """The second times of a batch."""

    s: Tensor
    """[N]: at least t."""
    split: Tensor
    """[N] in [0, 1): where to split the interval from t to s, as a fraction of it."""
    apart: Tensor
    """int64 [M], increasing: the examples with an s of their own; for all others s = t."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The second times with a function applied to every tensor."""
        return replace(self, s=change(self.s), split=change(self.split), apart=change(self.apart))


def draw_time_pairs(
    times: TimestepSampler, u: Tensor, more: Tensor, equal_times: float
) -> tuple[Tensor, SecondTimes]:
    """Times t [N] and second times, a pure function of the uniform numbers of each example.

    A fraction `equal_times` of the examples has s = t, with the t that a plain objective draws from the same
    u. For the others two times are drawn; the earlier one, nearer to the noise, is t.

    Args:
        times: the distribution of both times.
        u: uniform numbers in [0, 1), [N], on the device on which the times are needed.
        more: further uniform numbers, [N, NUMBERS]. On the CPU, so that the number of examples with two times
            is known without waiting for a GPU.
        equal_times: the fraction, in [0, 1].
    """
    apart = more[:, 0] >= equal_times
    chosen = apart.nonzero()[:, 0]
    more = more.to(u.device, non_blocking=True)
    first, second = times.times(u), times.times(more[:, 1].contiguous())
    apart = apart.to(u.device, non_blocking=True)
    t = torch.where(apart, torch.minimum(first, second), first)
    s = torch.where(apart, torch.maximum(first, second), first)
    return t, SecondTimes(s, more[:, 2], chosen.to(u.device, non_blocking=True))
