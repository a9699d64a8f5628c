"""Batches of one data-parallel rank, prefetched by one background thread.

The global batch at position g consists of the ids at positions g .. g + B - 1 of the stream; rank r of W
reads the r-th of W equal slices. All ranks get the same number of batches, and the stream is infinite.
"""

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from fm_core.data.reader import ImageReader
from fm_core.data.sampler import Sampler
from fm_core.errors import UserError
from fm_core.method.time_pairs import SecondTimes


@dataclass(frozen=True)
class Endpoints:
    """Noise, data and times of a batch."""

    x0: torch.Tensor
    """Noise, float32 [n, C, H, W]."""
    x1: torch.Tensor
    """Dequantized images, float32 [n, C, H, W]."""
    t: torch.Tensor
    """Times, float32 [n]."""
    second: SecondTimes | None = None
    """Second times, for objectives that need them."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The endpoints with a function applied to every tensor."""
        second = self.second and self.second.map(change)
        return replace(self, x0=change(self.x0), x1=change(self.x1), t=change(self.t), second=second)


@dataclass(frozen=True)
class Batch:
    """Images at consecutive stream positions, as passed from the loader to a training step."""

    first: int
    """Stream position of the first image."""
    images: torch.Tensor
    """Intensities, uint8 [n, C, H, W], or ends of trajectories, a float type, on the CPU; pinned if there is
    a GPU."""
    labels: torch.Tensor
    """Classes, int64 [n]; -1 without labels."""
    noise_positions: torch.Tensor
    """Stream position of the noise that each image is paired with, int64 [n]; for pairs of a sample set, its
    index in that set."""
    endpoints: Endpoints | None = None
    """Precomputed on the CPU if the run's generator cannot draw on the device of the step."""

    @property
    def positions(self) -> range:
        """Stream position of each image."""
        return range(self.first, self.first + len(self.labels))

    def to(self, device: torch.device) -> Self:
        """The batch on a device; copies from pinned memory are asynchronous."""
        return self.map(lambda part: part.to(device, non_blocking=True))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The batch with a function applied to every tensor."""
        return replace(
            self,
            images=change(self.images),
            labels=change(self.labels),
            noise_positions=change(self.noise_positions),
            endpoints=self.endpoints and self.endpoints.map(change),
        )


Prepare = Callable[[Batch], Batch]


class Batches:
    """Iterator over the micro-batches of a rank, starting at a stream position."""

    def __init__(
        self,
        reader: ImageReader,
        sampler: Sampler,
        *,
        position: int,
        global_batch: int,
        rank: int = 0,
        ranks: int = 1,
        micro_batch: int | None = None,
        prepare: Prepare | None = None,
        pairs_from: int | None = None,
        dtype: torch.dtype = torch.uint8,
        ahead: int = 4,
        look_ahead: int = 64,
    ) -> None:
        """Start reading at stream position `position`.

        Args:
            reader: used only by the background thread until `close`.
            sampler: the stream of ids.
            position: stream position of the first global batch; any integer from 0.
            global_batch: images per step over all ranks; a multiple of ranks.
            rank: data-parallel rank, 0 .. ranks - 1.
            ranks: data-parallel world size.
            micro_batch: images yielded at a time, a divisor of the rank's share; the share by default.
            prepare: called with each batch in the background thread.
            pairs_from: for pairs of a sample set, the index in the set of the image with id 0.
            dtype: type of the reader's images.
            ahead: number of batches read in advance.
            look_ahead: number of global batches whose remote shards are copied to this node in advance.

        Raises:
            UserError: global_batch does not divide into ranks and micro-batches.
        """
        share, rest = divmod(global_batch, ranks)
        self._micro = micro_batch or share
        if rest or not share or share % self._micro:
            raise UserError(
                f"train.global_batch: {global_batch} images do not divide into {ranks} processes "
                f"with micro-batches of {self._micro}"
            )
        self._reader, self._sampler = reader, sampler
        self._prepare, self._pairs_from, self._dtype = prepare, pairs_from, dtype
        self._position, self._step = position + rank * share, global_batch
        self._share, self._look_ahead = share, look_ahead
        # Batches are queued in groups, because waking the other thread costs as much as reading forty images.
        self._group_size = max(1, ahead // 2)
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(max(1, ahead // self._group_size))
        self._ready: list[Batch] = []
        self._buffers = BufferPool()
        self._closed = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch; raises any exception of the background thread."""
        if not self._ready:
            if self._failed is None:
                item = self._queue.get()
                if isinstance(item, BaseException):
                    self._failed = item
                else:
                    self._ready = item[::-1]
            if self._failed is not None:
                raise self._failed
        return self._ready.pop()

    def close(self) -> None:
        """Stop the background thread; the reader can be used again."""
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
            for step in range(self._look_ahead):
                self._prefetch(self._position + step * self._step, self._share)
            size, group = (
                1,
                list[Batch](),
            )  # the first batch is queued alone, because the consumer is waiting for it
            for first in self._firsts():
                self._prefetch(first + self._look_ahead * self._step, self._micro)
                group.append(self._batch(first))
                if len(group) == size:
                    if not self._put(group):
                        return
                    size, group = self._group_size, []
        except BaseException as error:
            self._put(error)

    def _firsts(self) -> Iterator[int]:
        start = self._position
        while True:
            yield from range(start, start + self._share, self._micro)
            start += self._step

    def _prefetch(self, first: int, count: int) -> None:
        if self._reader.remote:
            self._reader.prefetch(self._sampler.ids(first, count))

    def _batch(self, first: int) -> Batch:
        ids = self._sampler.ids(first, self._micro)
        images = self._buffers.take((len(ids), *self._reader.image_shape), self._dtype)
        labels = self._reader.read_into(ids, images)
        if self._pairs_from is None:
            noise = torch.arange(first, first + len(ids))
        else:
            noise = torch.from_numpy(ids + self._pairs_from)
        batch = Batch(first, images, labels, noise)
        if self._prepare is not None:
            batch = self._prepare(batch)
        # Images are already read into pinned memory; pinning them again does not copy them.
        return batch.map(torch.Tensor.pin_memory) if torch.cuda.is_available() else batch

    def _put(self, item: list[Batch] | BaseException) -> bool:
        """Queue an item; false if closed."""
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False


MAX_BUFFERS = 64

# Reference count of an array that only a list refers to; tensors created from an array add a reference.
_LISTED_ONCE = [np.empty(1, np.uint8)]
_UNUSED_REFERENCES = sys.getrefcount(_LISTED_ONCE[0])


class BufferPool:
    """Memory for batches, reused once no tensor refers to it.

    Without a GPU, malloc would return blocks of a background thread to the system at once, and touching new
    pages for every batch costs half as much as reading the images. With a GPU, torch caches pinned blocks
    itself, and reuses a block only after the copies from it have ended.
    """

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """An uninitialized tensor [*shape] on the CPU, pinned if there is a GPU."""
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        size = prod(shape) * dtype.itemsize
        for index in range(len(self._arrays)):
            if (
                sys.getrefcount(self._arrays[index]) == _UNUSED_REFERENCES
                and self._arrays[index].size == size
            ):
                return torch.from_numpy(self._arrays[index]).view(dtype).view(shape)
        array = np.empty(size, np.uint8)
        if len(self._arrays) < MAX_BUFFERS:
            self._arrays.append(array)
        return torch.from_numpy(array).view(dtype).view(shape)
