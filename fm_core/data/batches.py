"""Batches of one data-parallel rank, read ahead on one background thread.

The global batch at position g is the ids at positions g .. g + B - 1 of the stream; rank r of W has the
r-th of W equal slices. All ranks always have the same number of batches, and the stream has no end.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

import torch

from fm_core.data.buffer_pool import BufferPool
from fm_core.data.reader import ImageReader
from fm_core.data.sampler import Sampler
from fm_core.errors import UserError
from fm_core.storage import keyed_random


@dataclass(frozen=True)
class Batch:
    """Images at consecutive stream positions."""

    first: int
    """Stream position of the first image."""
    images: torch.Tensor
    """Grey values, uint8 [n, C, H, W], on the CPU; pinned where there is a GPU."""
    labels: torch.Tensor
    """Classes, int64 [n]; -1 without labels."""
    prepared: tuple[torch.Tensor, ...] = ()
    """What `prepare` made of it ahead of time; pinned where there is a GPU."""

    @property
    def positions(self) -> range:
        """Stream position of each image."""
        return range(self.first, self.first + len(self.labels))


Prepare = Callable[[Batch], tuple[torch.Tensor, ...]]


class Batches:
    """Iterator over the micro-batches of a rank, from a stream position on."""

    def __init__(
        self,
        reader: ImageReader,
        order: Sampler,
        *,
        position: int,
        global_batch: int,
        rank: int = 0,
        ranks: int = 1,
        micro_batch: int | None = None,
        flip_seed: int | None = None,
        prepare: Prepare | None = None,
        ahead: int = 4,
        look: int = 64,
    ) -> None:
        """Start to read at stream position `position`.

        Args:
            reader: from here on used by the background thread alone.
            order: the stream.
            position: where the first global batch begins; a multiple of nothing.
            global_batch: images of a step over all ranks; a multiple of ranks.
            rank: data-parallel rank, 0 .. ranks - 1.
            ranks: data-parallel world size.
            micro_batch: images yielded at a time, a divisor of the rank's share; by default the share.
            flip_seed: seed of the horizontal flips; None leaves images as they are.
            prepare: what the background thread makes of each batch as well.
            ahead: batches read in advance.
            look: global batches in advance whose remote shards begin to be copied to this node.

        Raises:
            UserError: sizes that do not divide.
        """
        share, rest = divmod(global_batch, ranks)
        self._micro = micro_batch or share
        if rest or not share or share % self._micro:
            raise UserError(
                f"train.global_batch: {global_batch} images do not divide into {ranks} processes "
                f"with micro-batches of {self._micro}"
            )
        self._reader, self._order = reader, order
        self._flip_seed, self._prepare = flip_seed, prepare
        self._position, self._step = position + rank * share, global_batch
        self._share, self._look = share, look
        # Handed over several at a time: waking the other thread costs as much as reading forty images.
        self._together = max(1, ahead // 2)
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(max(1, ahead // self._together))
        self._at_hand: list[Batch] = []
        self._buffers = BufferPool()
        self._closed = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch; raises what reading it raised."""
        if not self._at_hand:
            if self._failed is None:
                item = self._queue.get()
                if isinstance(item, BaseException):
                    self._failed = item
                else:
                    self._at_hand = item[::-1]
            if self._failed is not None:
                raise self._failed
        return self._at_hand.pop()

    def close(self) -> None:
        """Stop reading; the reader is free again."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _fill(self) -> None:
        try:
            for step in range(self._look):
                self._prefetch(self._position + step * self._step, self._share)
            together, group = 1, list[Batch]()  # the first one is waited for
            for first in self._firsts():
                self._prefetch(first + self._look * self._step, self._micro)
                group.append(self._batch(first))
                if len(group) == together:
                    if not self._put(group):
                        return
                    together, group = self._together, []
        except BaseException as error:
            self._put(error)

    def _firsts(self) -> Iterator[int]:
        start = self._position
        while True:
            yield from range(start, start + self._share, self._micro)
            start += self._step

    def _prefetch(self, first: int, count: int) -> None:
        if self._reader.remote:
            self._reader.prefetch(self._order.ids(first, count))

    def _batch(self, first: int) -> Batch:
        ids = self._order.ids(first, self._micro)
        images = self._buffers.take((len(ids), *self._reader.image_shape))
        labels = self._reader.read_into(ids, images)
        if self._flip_seed is not None:
            flip(images, self._flip_seed, first)
        batch = Batch(first, images, labels)
        if self._prepare is None:
            return batch
        prepared = self._prepare(batch)
        if torch.cuda.is_available():
            prepared = tuple(part.pin_memory() for part in prepared)
        return replace(batch, prepared=prepared)

    def _put(self, item: list[Batch] | BaseException) -> bool:
        """Hand over unless closed."""
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False


def flip(images: torch.Tensor, seed: int, first: int) -> None:
    """Flip about half of the images [n, C, H, W] left to right, in place.

    Which ones depends on (seed, stream position) alone; the first image is at position `first`.
    """
    draws = keyed_random.uniform(seed, "flip", range(first, first + len(images)), ())
    chosen = draws < 0.5
    images[chosen] = images[chosen].flip(-1)
