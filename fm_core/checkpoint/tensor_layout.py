"""Layout of the tensors of a checkpoint over the ranks: who holds which elements, in the order of the files.

Each rank keeps flat partitions ("shards") of all tensors one after another. A file of weights holds
complete tensors. It is the concatenation of pieces, each a range of a shard of one rank, so it can be written
while the pieces arrive, without a complete tensor in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist

PIECE_ELEMENTS = 2**22
"""Largest piece: 16 MB of float32."""


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a tensor that one rank holds."""

    name: str
    """Name of the tensor."""
    start: int
    """Index of the first element in the flattened tensor."""
    count: int
    shard: int
    """Number of the rank's shard that holds them."""
    offset: int
    """Index of the first element in the shard."""


@dataclass(frozen=True)
class ShardRange:
    """A range of a rank's shard; the pieces in order are the content of a file."""

    rank: int
    shard: int
    offset: int
    count: int


@dataclass(frozen=True)
class TensorLayout:
    """Shapes of all tensors in the order of the files, and the pieces that they consist of."""

    shapes: Mapping[str, tuple[int, ...]]
    pieces: tuple[ShardRange, ...]
    fragments: tuple[tuple[Fragment, ...], ...]
    """What each rank holds."""

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, ...]], fragments: Sequence[Sequence[Fragment]]
    ) -> "TensorLayout":
        """The layout for the fragments of each rank; RuntimeError if they do not cover every element once."""
        held: dict[str, list[tuple[int, Fragment]]] = {name: [] for name in shapes}
        for rank, own in enumerate(fragments):
            for fragment in own:
                held[fragment.name].append((rank, fragment))
        pieces: list[ShardRange] = []
        for name, shape in shapes.items():
            end = 0
            for rank, fragment in sorted(held[name], key=lambda item: item[1].start):
                if fragment.start != end:
                    raise RuntimeError(f"ZeRO has no float32 weight, or two, for {name} at element {end}")
                end += fragment.count
                _append(pieces, ShardRange(rank, fragment.shard, fragment.offset, fragment.count))
            if end != prod(shape):
                raise RuntimeError(f"ZeRO has {end} float32 weights for {name}, not {prod(shape)}")
        return cls(dict(shapes), _divided(pieces), tuple(tuple(own) for own in fragments))

    @classmethod
    def gathered(
        cls, shapes: Mapping[str, tuple[int, ...]], own: Sequence[Fragment], group: Any
    ) -> "TensorLayout":
        """The layout of a group from the fragments of each rank; without a group there is one rank."""
        fragments: list[Any] = [list(own)]
        if group:
            fragments = [None] * dist.get_world_size(group)
            dist.all_gather_object(fragments, list(own), group=group)
        return cls.of(shapes, fragments)

    def pieces_of(self, rank: int) -> tuple[ShardRange, ...]:
        """The pieces of all fragments of one rank, in their order."""
        pieces: list[ShardRange] = []
        for fragment in self.fragments[rank]:
            _append(pieces, ShardRange(rank, fragment.shard, fragment.offset, fragment.count))
        return _divided(pieces)

    def empty_tensors(self) -> dict[str, torch.Tensor]:
        """Float32 tensors of these shapes without content."""
        return {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}


def _append(pieces: list[ShardRange], piece: ShardRange) -> None:
    """Append a piece, or extend the last one if the two are adjacent in the same shard."""
    last = pieces[-1] if pieces else None
    if (
        last
        and (last.rank, last.shard) == (piece.rank, piece.shard)
        and last.offset + last.count == piece.offset
    ):
        pieces[-1] = ShardRange(last.rank, last.shard, last.offset, last.count + piece.count)
    elif piece.count:
        pieces.append(piece)


def _divided(pieces: Sequence[ShardRange]) -> tuple[ShardRange, ...]:
    return tuple(
        ShardRange(piece.rank, piece.shard, piece.offset + first, min(PIECE_ELEMENTS, piece.count - first))
        for piece in pieces
        for first in range(0, piece.count, PIECE_ELEMENTS)
    )
