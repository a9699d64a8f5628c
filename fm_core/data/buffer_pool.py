"""Memory for batches, used again when nobody holds the batch that was in it.

Without a GPU: blocks that malloc gives to a background thread go back to the system at once, and
touching fresh pages for every batch costs half as much as reading the images. With one, torch keeps
pinned blocks itself, and gives none out again before the copies from it have ended.
"""

import sys
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

MOST = 64

# What getrefcount says of an array that only a list holds; tensors made of an array hold it too.
_ALONE = [np.empty(1, np.uint8)]
_FREE = sys.getrefcount(_ALONE[0])


class BufferPool:
    """Tensors of uint8."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised tensor uint8 [*shape] on the CPU, pinned where there is a GPU."""
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = prod(shape)
        for index in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[index]) == _FREE and self._arrays[index].size == size:
                return torch.from_numpy(self._arrays[index]).view(shape)
        array = np.empty(size, np.uint8)
        if len(self._arrays) < MOST:
            self._arrays.append(array)
        return torch.from_numpy(array).view(shape)
