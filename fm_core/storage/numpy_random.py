"""The generator `numpy-v1`, for runs and files from versions without `philox-v1` only.

numpy's Philox is counter based: (seed, purpose, kind of number) make its key, and each position owns the
2^192 blocks whose highest counter word is that position, so that no two positions ever share a number.
All numbers are drawn on the CPU, because no GPU generator produces the same stream.

Validation losses use the purposes of training, and therefore the noise of the first training images of seed
0. This is kept so that their values remain comparable.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PURPOSES = {
    ("training", "noise"): "noise",
    ("training", "time"): "time",
    ("training", "dequantization"): "dequantise",
    ("training", "flip"): "flip",
    ("training", "label-dropout"): "label",
    ("training", "second-time"): "second-time",
    ("held-out", "noise"): "noise",
    ("held-out", "time"): "time",
    ("held-out", "dequantization"): "dequantise",
    ("held-out", "second-time"): "held-out-second-time",
    ("samples", "noise"): "sample-noise",
    ("samples", "class"): "sample-label",
    ("samples", "sampler-noise"): "sample-step-{index}",
    ("likelihood", "dequantization"): "likelihood-draw-{index}",
    ("likelihood", "probe"): "likelihood-probe-{index}",
    ("toy2d", "data"): "plane-data",
    ("toy2d", "noise"): "plane-noise",
    ("toy2d", "time"): "plane-time",
    ("toy2d-scoring", "data"): "plane-held-out",
    ("toy2d-scoring", "noise"): "plane-samples",
}
"""Domain and purpose -> name in its keys."""


def draw(
    seed: int, domain: str, purpose: str, kind: str, index: int, positions: Tensor, shape: Sequence[int]
) -> Tensor:
    """Random numbers float32 [N, *shape] on the CPU; arguments as for `philox.draw`, any integer as seed."""
    name = PURPOSES[domain, purpose].format(index=index)
    return rows(seed, name, kind, positions, shape)


def rows(seed: int, purpose: str, kind: str, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """One row of random numbers for each position, float32 [N, *shape]."""
    word, numbers = _KINDS[kind]
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{word}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    size = int(np.prod(shape, dtype=np.int64))
    content = np.empty((len(positions), size), dtype=np.float32)
    for row, position in zip(content, positions.tolist(), strict=True):
        counter = np.array([0, 0, 0, position], dtype=np.uint64)
        row[:] = numbers(np.random.Generator(np.random.Philox(counter=counter, key=key)), size)
    return torch.from_numpy(content).reshape(len(positions), *shape)


def _normal(generator: np.random.Generator, size: int) -> NDArray[np.float32]:
    return generator.standard_normal(size, dtype=np.float32)


def _uniform(generator: np.random.Generator, size: int) -> NDArray[np.float32]:
    return generator.random(size, dtype=np.float32)


def _sign(generator: np.random.Generator, size: int) -> NDArray[np.float32]:
    bits = np.unpackbits(np.frombuffer(generator.bytes((size + 7) // 8), dtype=np.uint8), count=size)
    return bits.astype(np.float32) * 2 - 1


_KINDS: dict[str, tuple[str, Callable[[np.random.Generator, int], NDArray[np.float32]]]] = {
    "normal": ("normal", _normal),
    "uniform": ("uniform", _uniform),
    "sign": ("rademacher", _sign),
}
"""Kind of number -> its name in the keys, and its function."""
