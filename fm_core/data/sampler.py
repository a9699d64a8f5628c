"""Samplers: the global order of image ids as a function of (seed, stream position).

A stream position counts images since the start of the stream. Samplers do not depend on batches or
shards, so resuming needs one integer. GlobalShuffleSampler permutes all images each epoch; its stream is the
same for any number of processes. BlockShuffleSampler is for data larger than a node's disk: it shuffles
blocks, and images within a bounded window.

Positions are assigned to V virtual ranks, `run` consecutive ones at a time. In each epoch the blocks are
permuted and concatenated, the sequence is split into V segments, and each virtual rank reads its segment
window by window, in random order within a window. Therefore a virtual rank needs only the blocks of one
window at a time, and every epoch contains each image exactly once. With a global batch of V * run images and
W processes, W a divisor of V, each process reads only its own V / W virtual ranks.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fm_core.errors import UserError

ORDER_VERSION = 1
"""Incremented with every change of the stream of a seed."""

Int64s = NDArray[np.int64]
_BLOCKS, _WINDOW = 1, 2


class Sampler(Protocol):
    """An infinite stream of ids."""

    def ids(self, position: int, count: int) -> NDArray[np.int64]:
        """The ids at stream positions position .. position + count - 1; int64 [count]."""
        ...


class GlobalShuffleSampler:
    """Sampler of ids 0 .. images - 1, each once per epoch, in an order keyed by (seed, epoch)."""

    def __init__(self, seed: int, images: int) -> None:
        if images < 1:
            raise ValueError(f"a stream needs at least one image, not {images}")
        self.seed = seed
        self.images = images
        # Two epochs, because a batch may contain both and prefetching is ahead of reading.
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def ids(self, position: int, count: int) -> NDArray[np.int64]:
        """The ids at stream positions position .. position + count - 1; int64 [count]."""
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        parts: list[NDArray[np.int64]] = []
        while count:
            epoch, start = divmod(position, self.images)
            part = self._permutation(epoch)[start : start + count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        # The raw stream of the bit generator is stable; Generator.permutation may change between numpy
        # versions.
        keys = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.images)
        return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


class BlockShuffleSampler:
    """Sampler of ids 0 .. images - 1, each once per epoch, shuffled by blocks, keyed by (seed, epoch)."""

    def __init__(
        self, seed: int, block_images: Sequence[int], virtual_ranks: int, run: int, window: int
    ) -> None:
        """Set up the sampler.

        Args:
            seed: seed of the stream.
            block_images: number of images in each block, in id order.
            virtual_ranks: number of streams that are distributed over processes.
            run: consecutive positions of one virtual rank.
            window: number of images among which a virtual rank shuffles.
        """
        self._seed = seed
        self._sizes = np.array(block_images, np.int64)
        self.images = int(self._sizes.sum())
        if self.images < 1 or min(virtual_ranks, run, window) < 1:
            raise ValueError("images, virtual_ranks, run and window must be at least 1")
        self._first = np.cumsum(self._sizes) - self._sizes
        self._ranks, self._run, self._window = virtual_ranks, run, window
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        # Each virtual rank is in one window, or in two if a batch contains the boundary of windows.
        self._window_order = lru_cache(maxsize=2 * virtual_ranks)(self._permute_window)

    def check_world(self, ranks: int, global_batch: int) -> None:
        """Raise UserError unless each of `ranks` processes reads its own virtual ranks."""
        if self._ranks % ranks or global_batch != self._ranks * self._run:
            raise UserError(
                f"data.virtual_ranks: {self._ranks} virtual ranks of {self._run} images need batches of "
                f"{self._ranks * self._run} and a number of processes that divides {self._ranks}, "
                f"not batches of {global_batch} on {ranks} processes"
            )

    def blocks_at_a_time(self, ranks: range) -> Iterator[Int64s]:
        """Blocks that the virtual ranks `ranks` read at a time, for each window of epoch 0; int64 [blocks].

        These are the blocks of two windows, because the next one is prefetched while one is read.
        """
        starts, order, ends = self._epoch(0)
        for first in range(0, int(np.diff(starts).max()), self._window):
            slots = [np.empty(0, np.int64)]
            for rank in ranks:
                begin, end = int(starts[rank]) + first, int(starts[rank + 1])
                if begin < end:
                    last = min(begin + 2 * self._window, end) - 1
                    low, high = np.searchsorted(ends, (begin, last), "right").tolist()
                    slots.append(np.arange(low, high + 1))
            yield order[np.unique(np.concatenate(slots))]

    def ids(self, position: int, count: int) -> Int64s:
        """The ids at stream positions position .. position + count - 1; int64 [count]."""
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        positions = np.arange(position, position + count, dtype=np.int64)
        out = np.empty(count, np.int64)
        epochs = positions // self.images
        ranks = positions // self._run % self._ranks
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            for rank in np.unique(ranks[in_epoch]).tolist():
                chosen = in_epoch & (ranks == rank)
                out[chosen] = self._ids_of(epoch, rank, positions[chosen])
        return out

    def _ids_of(self, epoch: int, rank: int, positions: Int64s) -> Int64s:
        """Ids at positions of one virtual rank in one epoch."""
        starts, order, ends = self._epoch(epoch)
        begin, length = int(starts[rank]), int(starts[rank + 1] - starts[rank])
        index = self._count_before(positions, rank) - self._count_before(np.array(epoch * self.images), rank)
        windows = index // self._window
        places = np.empty_like(index)
        for window in np.unique(windows).tolist():
            chosen = windows == window
            first = window * self._window
            shuffled = self._window_order(epoch, rank, window, min(self._window, length - first))
            places[chosen] = begin + first + shuffled[index[chosen] - first]
        slot = np.searchsorted(ends, places, "right")
        block = order[slot]
        return self._first[block] + places - (ends[slot] - self._sizes[block])

    def _count_before(self, position: Int64s, rank: int) -> Int64s:
        """Number of positions below `position` that belong to a virtual rank."""
        rounds, rest = np.divmod(position, self._run * self._ranks)
        return rounds * self._run + np.clip(rest - rank * self._run, 0, self._run)

    def _make_epoch(self, epoch: int) -> tuple[Int64s, Int64s, Int64s]:
        """Starts of the segments, int64 [V + 1]; order of the blocks; end of each block in the sequence."""
        begin, end = np.array(epoch * self.images), np.array((epoch + 1) * self.images)
        lengths = [
            int(self._count_before(end, rank) - self._count_before(begin, rank))
            for rank in range(self._ranks)
        ]
        order = self._permutation(len(self._sizes), epoch, _BLOCKS, 0, 0)
        return np.cumsum([0, *lengths]), order, np.cumsum(self._sizes[order])

    def _permute_window(self, epoch: int, rank: int, window: int, length: int) -> Int64s:
        return self._permutation(length, epoch, _WINDOW, rank, window)

    def _permutation(self, length: int, epoch: int, kind: int, rank: int, window: int) -> Int64s:
        # The counter's lowest word counts up to the length; the other words identify the window.
        bits = np.random.Philox(
            key=np.array([self._seed, epoch], np.uint64),
            counter=np.array([0, window, rank, kind], np.uint64),
        )
        return np.argsort(bits.random_raw(length), kind="stable").astype(np.int64, copy=False)
