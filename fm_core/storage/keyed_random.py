"""Random numbers as a pure function of (seed, domain, purpose, position, element).

Example i of a stream gets the same noise regardless of the batch, the order, the number of processes or where
training resumed. There are two generators; a run keeps the one it started with, and its files record it.
Files that record none were written by versions that had only `numpy-v1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.storage import numpy_random, philox

GeneratorName = Literal["philox-v1", "numpy-v1"]
"""philox-v1: Philox 4x32-10 on the device of the step; numpy-v1: numpy's Philox 4x64-10 on the CPU.

Any change to the numbers of a generator requires a new name."""
CURRENT: GeneratorName = "philox-v1"
"""Generator of new runs."""
UNNAMED: GeneratorName = "numpy-v1"
"""Generator of files that record none."""
CPU = torch.device("cpu")

Positions = Sequence[int] | Tensor
Kind = Literal["normal", "uniform", "sign"]


class Domain(StrEnum):
    """Parts of the program whose random numbers never coincide under `philox-v1`, even for equal seeds."""

    TRAINING = "training"
    HELD_OUT = "held-out"
    """Validation loss."""
    SAMPLES = "samples"
    LIKELIHOOD = "likelihood"
    TOY2D = "toy2d"
    """Training in 2-D."""
    TOY2D_SCORING = "toy2d-scoring"
    """Scores of models in 2-D."""


class Purpose(StrEnum):
    """What random numbers are for; those of two purposes are independent."""

    NOISE = "noise"
    TIME = "time"
    DEQUANTIZATION = "dequantization"
    FLIP = "flip"
    LABEL_DROPOUT = "label-dropout"
    CLASS = "class"
    """Classes of samples."""
    PROBE = "probe"
    """Hutchinson's probes."""
    DATA = "data"
    """Points of a 2-D distribution."""
    STEP_NOISE = "sampler-noise"
    """Noise that a stochastic sampler adds in a step; the index is the step's number."""
    SECOND_TIME = "second-time"
    """Second times of flow maps: whether there is one, its quantile, and where to split the interval."""


@dataclass(frozen=True)
class KeyedRandom:
    """The random numbers of a generator, a seed and a domain.

    Args:
        generator: name of the generator.
        seed: any integer in 0 .. 2^64 - 1.
        domain: the part of the program.
        compiled: whether to compile with torch.compile; numbers change by rounding at most.
    """

    generator: GeneratorName
    seed: int
    domain: Domain
    compiled: bool = False

    @property
    def on_device(self) -> bool:
        """Whether numbers are computed on the requested device; otherwise on the CPU, more slowly."""
        return self.generator != "numpy-v1"

    def normal(
        self,
        purpose: Purpose,
        positions: Positions,
        shape: Sequence[int] = (),
        device: torch.device = CPU,
        index: int = 0,
    ) -> Tensor:
        """Standard normal numbers, float32 [N, *shape] on the device.

        Row n is a function of (seed, domain, purpose, index, positions[n]) only: bit-identical on one kind of
        device, equal up to float rounding across kinds.

        Args:
            purpose: what the numbers are for.
            positions: N integers in 0 .. 2^63 - 1; a sequence, or an int64 tensor, best on the same device.
            shape: shape of one example; () gives [N].
            device: where the numbers are needed.
            index: index of the draw, if there are several for one purpose; 0 .. 2^16 - 1.

        Raises:
            ValueError: a position on the CPU, the index or the seed is out of range.
        """
        return self._draw("normal", purpose, positions, shape, device, index)

    def uniform(
        self,
        purpose: Purpose,
        positions: Positions,
        shape: Sequence[int] = (),
        device: torch.device = CPU,
        index: int = 0,
    ) -> Tensor:
        """Uniform numbers in [0, 1), multiples of 2^-24, float32 [N, *shape]; the same bits on every device.

        Arguments and errors as of `normal`.
        """
        return self._draw("uniform", purpose, positions, shape, device, index)

    def sign(
        self,
        purpose: Purpose,
        positions: Positions,
        shape: Sequence[int] = (),
        device: torch.device = CPU,
        index: int = 0,
    ) -> Tensor:
        """Signs -1 or 1 with equal probability, float32 [N, *shape]; the same on every device.

        Arguments and errors as of `normal`.
        """
        return self._draw("sign", purpose, positions, shape, device, index)

    def _draw(
        self,
        kind: Kind,
        purpose: Purpose,
        positions: Positions,
        shape: Sequence[int],
        device: torch.device,
        index: int,
    ) -> Tensor:
        key = self.seed, self.domain.value, purpose.value, kind, index
        if self.generator == "numpy-v1":
            return numpy_random.draw(*key, _on(CPU, positions), shape).to(device)
        return philox.draw(*key, _on(device, positions), shape, self.compiled)


def generator_of(record: dict[str, Any], where: str) -> GeneratorName:
    """The generator recorded in a recipe or protocol; `where` is its source, for the error.

    Raises UserError if this version does not have it.
    """
    name = record.get("generator", UNNAMED)
    if name not in get_args(GeneratorName):
        known = " and ".join(get_args(GeneratorName))
        raise UserError(f"{where}: generator {name!r} of another version; this one has {known}")
    return name


def generator_record(generator: GeneratorName) -> dict[str, str]:
    """The generator's entry in a recipe or protocol: empty for `numpy-v1`, as in earlier files."""
    return {} if generator == UNNAMED else {"generator": generator}


def _on(device: torch.device, positions: Positions) -> Tensor:
    """Positions as int64 [N] on a device. ValueError if out of range, unchecked if already on a GPU."""
    if isinstance(positions, Tensor):
        # On a GPU, reading them would synchronize the device.
        known = positions if positions.device.type == "cpu" and len(positions) else None
        bounds = [] if known is None else [int(known.min())]
    else:
        bounds = [min(positions), max(positions)] if positions else []
    if any(not 0 <= bound < 2**63 for bound in bounds):
        raise ValueError("a position must lie in 0 .. 2^63 - 1")
    if isinstance(positions, Tensor):
        return positions.to(device, non_blocking=True)
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, positions.step, device=device)
    return torch.tensor(positions, dtype=torch.int64, device=device)
