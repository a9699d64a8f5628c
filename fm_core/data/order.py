"""The endless stream of image ids: one permutation per epoch, joined end to end.

A position counts images since the stream began. Nothing here knows of batches, ranks or shards, so
the stream is the same for every number of processes, and resuming needs one integer.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1
"""Changes whenever the same seed would give another stream."""


class StreamOrder:
    """Ids 0 .. images - 1, every one once in each epoch, in an order keyed by (seed, epoch)."""

    def __init__(self, seed: int, images: int) -> None:
        if images < 1:
            raise ValueError(f"a stream needs at least one image, not {images}")
        self.seed = seed
        self.images = images
        # Two epochs: a batch may straddle them, and a prefetching thread runs ahead of a reader.
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def ids(self, position: int, count: int) -> NDArray[np.int64]:
        """The ids at stream positions position .. position + count - 1; int64 [count]."""
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        pieces: list[NDArray[np.int64]] = []
        while count:
            epoch, start = divmod(position, self.images)
            piece = self._permutation(epoch)[start : start + count]
            pieces.append(piece)
            position += len(piece)
            count -= len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        # The bit generator's raw stream is fixed for ever; Generator.permutation may change with numpy.
        keys = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.images)
        return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
