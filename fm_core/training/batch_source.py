"""Training batches: images, noise, times and labels as a function of only (seed, stream position).

The noise of a pair of a sample set is a function of the image's index in the set instead.

The loader's thread reads uint8 images; all random numbers are drawn here, on the device of the step.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fm_core.data.batches import Batch, Batches, Endpoints
from fm_core.data.reader import ImageReader
from fm_core.data.sampler import Sampler
from fm_core.method.couplings import Coupling
from fm_core.method.dequantization import Quantizer
from fm_core.method.paths import Path, PathSample
from fm_core.method.time_pairs import NUMBERS, SecondTimes, draw_time_pairs
from fm_core.method.timestep_samplers import TimestepSampler
from fm_core.storage.keyed_random import KeyedRandom, Purpose


def ambient_seed(seed: int, position: int) -> int:
    """Seed of torch's own generator for the micro-batch that starts at a stream position."""
    digest = hashlib.blake2b(f"{seed}\0ambient\0{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's own generators of the CPU and of `device`.

    Not torch.manual_seed, which seeds every supported kind of device and takes 1 ms even without a GPU.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@dataclass(frozen=True)
class PairNoise:
    """The noise of images that are samples of a model, by their index in the sample set."""

    random: KeyedRandom
    first: int
    """Index in the sample set of the image with id 0."""
    dtype: torch.dtype
    """Type of the images: a float for ends of trajectories, uint8 for intensity levels."""


class BatchSource:
    """Prefetched images in stream order, and the random numbers drawn for them by stream position."""

    def __init__(
        self,
        reader: ImageReader,
        order: Sampler,
        quantizer: Quantizer,
        path: Path,
        coupling: Coupling,
        times: TimestepSampler,
        random: KeyedRandom,
        flip: bool,
        label_dropout: float = 0.0,
        null_label: int = 0,
        pairs: PairNoise | None = None,
        equal_times: float | None = None,
    ) -> None:
        """Combine the parts of a batch.

        `label_dropout` is the fraction of labels that are replaced by the null label. `pairs`: the reader's
        images are samples, and this is their noise. `equal_times` is that of the objective: None for one
        time, else times are drawn in pairs.
        """
        self.reader, self.order, self.quantizer = reader, order, quantizer
        self.path, self.coupling, self.times = path, coupling, times
        self.random, self.flip = random, flip
        self.label_dropout, self.null_label = label_dropout, null_label
        self.pairs, self.equal_times = pairs, equal_times

    @property
    def seed(self) -> int:
        """Seed of all random numbers of training."""
        return self.random.seed

    def batches(self, position: int, global_batch: int, rank: int, ranks: int, micro_batch: int) -> Batches:
        """The micro-batches of a rank from a stream position on; they own the reader while they are open."""
        ahead = self.coupling.reorders_noise or not self.random.on_device
        return Batches(
            self.reader,
            self.order,
            position=position,
            global_batch=global_batch,
            rank=rank,
            ranks=ranks,
            micro_batch=micro_batch,
            prepare=self._prepare if ahead else None,
            pairs_from=self.pairs.first if self.pairs else None,
            dtype=self.pairs.dtype if self.pairs else torch.uint8,
        )

    def draw(self, batch: Batch, device: torch.device) -> tuple[PathSample, Tensor]:
        """Points on the path for one micro-batch and their labels int64 [n], on the device."""
        batch = batch.to(device)
        ends = batch.endpoints or self._endpoints(batch)
        sample = self.path.sample(ends.x0, ends.x1, ends.t)
        return replace(sample, second=ends.second), self._labels(batch)

    def _prepare(self, batch: Batch) -> Batch:
        """Computations that run on the CPU, in the loader's thread, to be identical on every device.

        A coupling gets noise and data, and returns a permutation of the noise.
        """
        ends = self._endpoints(batch)
        order = self.coupling.noise_order(ends.x0, ends.x1, batch.labels)
        if order is not None:
            batch = replace(batch, noise_positions=batch.noise_positions[order])
            ends = replace(ends, x0=ends.x0[order])
        return batch if self.random.on_device else replace(batch, endpoints=ends)

    def _endpoints(self, batch: Batch) -> Endpoints:
        """Noise, data and times, on the device of the images."""
        device, shape = batch.images.device, tuple(batch.images.shape[1:])
        positions = torch.arange(batch.first, batch.first + len(batch.images), device=device)
        images = batch.images
        if self.flip:
            flipped = self.random.uniform(Purpose.FLIP, positions, device=device) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        noise = self.pairs.random if self.pairs else self.random
        t, second = self._times(batch, positions)
        return Endpoints(
            x0=noise.normal(Purpose.NOISE, batch.noise_positions, shape, device),
            x1=self._data(images, positions),
            t=t,
            second=second,
        )

    def _data(self, images: Tensor, positions: Tensor) -> Tensor:
        """Dequantized images, float32; ends of trajectories as they are."""
        if images.is_floating_point():
            return images.float()
        shape = tuple(images.shape[1:])
        dither = self.random.uniform(Purpose.DEQUANTIZATION, positions, shape, images.device)
        return self.quantizer.dequantize(images, dither)

    def _times(self, batch: Batch, positions: Tensor) -> tuple[Tensor, SecondTimes | None]:
        """The times float32 [n] on the device of the positions, and the second times if there are any."""
        u = self.random.uniform(Purpose.TIME, positions, device=positions.device)
        if self.equal_times is None:
            return self.times.times(u), None
        numbers = range(batch.first, batch.first + len(batch.images))
        # A few numbers on the CPU are not worth compiling; they have the same bits on every device.
        more = replace(self.random, compiled=False).uniform(Purpose.SECOND_TIME, numbers, (NUMBERS,))
        return draw_time_pairs(self.times, u, more, self.equal_times)

    def _labels(self, batch: Batch) -> Tensor:
        """The labels, some replaced by the null label, as classifier-free guidance requires."""
        if not self.label_dropout:
            return batch.labels
        device = batch.labels.device
        chances = self.random.uniform(Purpose.LABEL_DROPOUT, batch.positions, device=device)
        return batch.labels.masked_fill(chances < self.label_dropout, self.null_label)
