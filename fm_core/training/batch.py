"""What one optimizer step trains on: a function of (seed, stream position) alone."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.data.order import StreamOrder
from fm_core.data.reader import ImageReader
from fm_core.method import keyed_random
from fm_core.method.couplings import Coupling
from fm_core.method.paths import Path, PathSample
from fm_core.method.quantiser import Quantiser
from fm_core.method.times import Times


@dataclass(frozen=True)
class Slice:
    """The stream positions one process trains on in one forward pass: [first, first + count)."""

    first: int
    count: int


def slices(position: int, global_batch: int, rank: int, ranks: int, micro_batch: int) -> list[Slice]:
    """The micro-batches of a rank for the global batch [position, position + global_batch)."""
    share = global_batch // ranks
    start = position + rank * share
    return [Slice(first, micro_batch) for first in range(start, start + share, micro_batch)]


def ambient_seed(seed: int, position: int) -> int:
    """Seed of torch's own generator for the micro-batch that begins at a stream position."""
    digest = hashlib.blake2b(f"{seed}\0ambient\0{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BatchSource:
    """Draws images, noise, times and dequantisation by stream position."""

    def __init__(
        self,
        reader: ImageReader,
        order: StreamOrder,
        quantiser: Quantiser,
        path: Path,
        coupling: Coupling,
        times: Times,
        seed: int,
        flip: bool,
    ) -> None:
        self.reader, self.order, self.quantiser = reader, order, quantiser
        self.path, self.coupling, self.times = path, coupling, times
        self.seed, self.flip = seed, flip

    def draw(self, piece: Slice, device: torch.device) -> tuple[PathSample, Tensor]:
        """Points on the path for one micro-batch and their labels, on the device."""
        positions = range(piece.first, piece.first + piece.count)
        pixels, labels = self.reader.read(self.order.ids(piece.first, piece.count))
        shape = tuple(pixels.shape[1:])
        if self.flip:
            heads = keyed_random.uniform(self.seed, "flip", positions, ()) < 0.5
            pixels = torch.where(heads.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        dither = keyed_random.uniform(self.seed, "dequantise", positions, shape)
        x1 = self.quantiser.dequantise(pixels, dither)
        x0 = keyed_random.normal(self.seed, "noise", positions, shape)
        t = self.times.times(keyed_random.uniform(self.seed, "time", positions, ()))
        # A coupling leaves x1 where it is in the stream, and with it its label.
        x0, x1, _ = self.coupling.pair(x0, x1, labels)
        x0, x1, t = (part.to(device, non_blocking=True) for part in (x0, x1, t))
        return self.path.sample(x0, x1, t), labels.to(device, non_blocking=True)
