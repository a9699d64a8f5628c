"""Philox 4x32-10, a counter-based generator, in integer operations of torch: the same on every device.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). The key is the seed, 64 bits. The counter
has four words of 32 bits:

    word 0      number of the block of four elements inside one example
    words 1, 2  position of the example
    word 3      what the numbers are for: domain, purpose, kind of number, index

Two different counters of one seed never give the same block, because Philox is a bijection of the counters.
Element e of an example is computed from word e % 4 of block e // 4: it depends neither on the shape of the
example nor on which others are drawn with it. torch has no unsigned 32-bit arithmetic, so each word is held
in an int64.

This module determines every random number of a run. Any change to the numbers requires a new generator name
in `fm_core.storage.keyed_random`.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
"""Largest word, and bit mask of a word."""

DOMAINS = {"training": 1, "held-out": 2, "samples": 3, "likelihood": 4, "toy2d": 5, "toy2d-scoring": 6}
PURPOSES = {
    **{"noise": 1, "time": 2, "dequantization": 3, "flip": 4, "label-dropout": 5},
    **{"class": 6, "probe": 7, "data": 8, "sampler-noise": 9, "second-time": 10},
}
KINDS = {"normal": 1, "uniform": 2, "sign": 3}
MAX_INDEX = 2**16 - 1

CPU_BLOCKS = 3 * 2**13
"""Blocks computed at a time on a CPU, so that their words, six int64 each, fit into its L2 cache."""
GPU_BLOCKS = 2**24
"""Blocks computed at a time on a GPU, which limits the memory of intermediate words to about 1 GB."""

Keys = Sequence[tuple[int, int]] | Sequence[tuple[Tensor, Tensor]]
Fill = Callable[[Tensor, Sequence[Tensor]], None]


def philox(counter: Sequence[Tensor], keys: Keys) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter.

    Args:
        counter: four int64 tensors of words, whose shapes broadcast against one another.
        keys: the keys of the rounds, from `round_keys`; tensors of one element or integers.

    Returns:
        Four int64 tensors of words, in the common shape.
    """
    c0, c1, c2, c3 = counter
    shape = torch.broadcast_shapes(*(word.shape for word in counter))
    # Only words 0 and 2 are multiplied. Words 1 and 3 keep the upper halves of the products until the end.
    for k0, k1 in keys[:2]:  # the words are not yet broadcast to the common shape
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) ^ (c1 ^ k0)) & WORD, ((p0 >> 32) ^ (c3 ^ k1)) & WORD
        c1, c3 = p1, p0
    c0, c1, c2, c3 = (word.expand(shape).contiguous() for word in (c0, c1, c2, c3))
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    for k0, k1 in keys[2:]:
        torch.mul(c0, MULTIPLIERS[0], out=p0)
        torch.mul(c2, MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3, p0, p1 = p1, p0, c1, c3
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def round_keys(seed: int) -> list[tuple[int, int]]:
    """The keys of the ten rounds.

    Raises:
        ValueError: the seed is not in 0 .. 2^64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must lie in 0 .. 2^64 - 1, not {seed}")
    words = seed & WORD, seed >> 32
    return [
        ((words[0] + r * KEY_STEPS[0]) & WORD, (words[1] + r * KEY_STEPS[1]) & WORD) for r in range(ROUNDS)
    ]


def purpose_word(domain: str, purpose: str, kind: str, index: int) -> int:
    """Word 3 of the counter. Raises ValueError for an index that is not in 0 .. 2^16 - 1."""
    if not 0 <= index <= MAX_INDEX:
        raise ValueError(f"an index must lie in 0 .. {MAX_INDEX}, not {index}")
    return DOMAINS[domain] << 26 | PURPOSES[purpose] << 20 | KINDS[kind] << 16 | index


def draw(
    seed: int,
    domain: str,
    purpose: str,
    kind: str,
    index: int,
    positions: Tensor,
    shape: Sequence[int],
    compiled: bool = False,
) -> Tensor:
    """Random numbers float32 [N, *shape], on the device of the positions.

    Args:
        seed: 0 .. 2^64 - 1.
        domain: a key of DOMAINS.
        purpose: a key of PURPOSES.
        kind: normal, uniform (in [0, 1), multiples of 2^-24) or sign (-1 or 1).
        index: number of the draw for this purpose, 0 .. 2^16 - 1.
        positions: int64 [N], in 0 .. 2^63 - 1.
        shape: shape of one example; () gives [N].
        compiled: whether to use torch.compile, which compiles for each number of positions and each shape.

    Raises:
        ValueError: seed or index are out of range.
    """
    size = math.prod(shape)
    out = torch.empty(len(positions), -(-size // 4), 4, dtype=torch.float32, device=positions.device)
    word, keys = purpose_word(domain, purpose, kind, index), round_keys(seed)
    if compiled:
        _compiled(kind)(out, positions, _on_device(seed, word, positions.device))
    else:
        _fill_in_chunks(out, positions, word, keys, _FILLS[kind])
    return out.flatten(1)[:, :size].reshape(len(positions), *shape)


def _fill_in_chunks(out: Tensor, positions: Tensor, word: int, keys: Keys, fill: Fill) -> None:
    limit = CPU_BLOCKS if out.device.type == "cpu" else GPU_BLOCKS
    examples, blocks = out.shape[:2]
    columns = min(blocks, limit) or 1
    rows = max(1, limit // columns)
    # Not torch.tensor, which synchronizes with a GPU.
    purpose = torch.full((1, 1), word, dtype=torch.int64, device=out.device)
    for first in range(0, examples, rows):
        position = positions[first : first + rows, None]
        low, high = position & WORD, position >> 32
        for start in range(0, blocks, columns):
            part = out[first : first + rows, start : start + columns]
            block = torch.arange(start, start + part.shape[1], device=out.device)[None]
            fill(part, philox((block, low, high, purpose), keys))


def _fill_normal(out: Tensor, words: Sequence[Tensor]) -> None:
    """Box-Muller: words 0 and 1 give elements 0 and 1, words 2 and 3 give elements 2 and 3.

    The radius is that of the uniform number (w + 1/2) / 2^32 in float32, at most 6.77. Of standard normal
    numbers, one in 8e10 is larger.
    """
    for first in (0, 2):
        # float32 represents small words, which determine the tail, exactly; 2^32 - 1 gives the radius 0.
        radius = words[first].float().add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
        angle = words[first + 1].float().mul_(2 * math.pi / 2**32)
        torch.mul(radius, torch.cos(angle), out=out[..., first])
        torch.mul(radius, angle.sin_(), out=out[..., first + 1])


def _fill_uniform(out: Tensor, words: Sequence[Tensor]) -> None:
    """The upper 24 bits of each word: exact in float32, and below 1."""
    for number, word in enumerate(words):
        torch.mul((word >> 8).float(), 2**-24, out=out[..., number])


def _fill_sign(out: Tensor, words: Sequence[Tensor]) -> None:
    """The highest bit of each word."""
    for number, word in enumerate(words):
        torch.sub(1, (word >> 31).float(), alpha=2, out=out[..., number])


_FILLS: dict[str, Fill] = {"normal": _fill_normal, "uniform": _fill_uniform, "sign": _fill_sign}


@cache
def _compiled(kind: str) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Compile the computation of all blocks; seed and purpose are a tensor, to avoid recompilation."""

    def fill(out: Tensor, positions: Tensor, settings: Tensor) -> None:
        words = settings.unbind()
        keys = [*zip(words[1::2], words[2::2], strict=True)]
        position = positions[:, None]
        block = torch.arange(out.shape[1], device=out.device)[None]
        _FILLS[kind](out, philox((block, position & WORD, position >> 32, words[0][None, None]), keys))

    return torch.compile(fill, dynamic=False)


@cache
def _on_device(seed: int, word: int, device: torch.device) -> Tensor:
    """The purpose and the keys of the rounds, int64 [21]."""
    return torch.tensor([word, *(key for pair in round_keys(seed) for key in pair)], device=device)
