"""Training batches: images, noise, times and labels as a function of (seed, stream position) alone."""

import hashlib

import torch
from torch import Tensor

from fm_core.data.batches import Batch, Batches
from fm_core.data.reader import ImageReader
from fm_core.data.sampler import Sampler
from fm_core.method.couplings import Coupling
from fm_core.method.dequantization import Quantizer
from fm_core.method.paths import Path, PathSample
from fm_core.method.timestep_samplers import TimestepSampler
from fm_core.storage import keyed_random
from fm_core.training.label_dropout import drop_labels


def ambient_seed(seed: int, position: int) -> int:
    """Seed of torch's own generator for the micro-batch that starts at a stream position."""
    digest = hashlib.blake2b(f"{seed}\0ambient\0{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's own generators of the CPU and of `device`.

    Not torch.manual_seed, which seeds every kind of device there could be; without a GPU that takes 1 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class BatchSource:
    """Images read ahead in stream order, with noise, times and dequantization drawn by stream position."""

    def __init__(
        self,
        reader: ImageReader,
        order: Sampler,
        quantizer: Quantizer,
        path: Path,
        coupling: Coupling,
        times: TimestepSampler,
        seed: int,
        flip: bool,
        label_dropout: float = 0.0,
        null_label: int = 0,
    ) -> None:
        """`label_dropout` is the share of labels that is replaced by the null label."""
        self.reader, self.order, self.quantizer = reader, order, quantizer
        self.path, self.coupling, self.times = path, coupling, times
        self.seed, self.flip = seed, flip
        self.label_dropout, self.null_label = label_dropout, null_label

    def batches(self, position: int, global_batch: int, rank: int, ranks: int, micro_batch: int) -> Batches:
        """The micro-batches of a rank from a stream position on; while open, they own the reader."""
        return Batches(
            self.reader,
            self.order,
            position=position,
            global_batch=global_batch,
            rank=rank,
            ranks=ranks,
            micro_batch=micro_batch,
            flip_seed=self.seed if self.flip else None,
            prepare=self._endpoints,
        )

    def draw(self, batch: Batch, device: torch.device) -> tuple[PathSample, Tensor]:
        """Points on the path for one micro-batch and their labels, on the device."""
        x0, x1, t = (part.to(device, non_blocking=True) for part in batch.prepared)
        labels = drop_labels(batch.labels, batch.positions, self.seed, self.label_dropout, self.null_label)
        return self.path.sample(x0, x1, t), labels.to(device, non_blocking=True)

    def _endpoints(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, dequantized images and times, drawn ahead on the CPU so that a GPU need not wait."""
        shape = tuple(batch.images.shape[1:])
        dither = keyed_random.uniform(self.seed, "dequantise", batch.positions, shape)
        x1 = self.quantizer.dequantize(batch.images, dither)
        x0 = keyed_random.normal(self.seed, "noise", batch.positions, shape)
        t = self.times.times(keyed_random.uniform(self.seed, "time", batch.positions, ()))
        # A coupling reorders x0 only: x1 keeps its place in the stream, and with it its label.
        x0, x1, _ = self.coupling.pair(x0, x1, batch.labels)
        return x0, x1, t
