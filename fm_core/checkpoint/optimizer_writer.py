"""Writes the shards of the optimizer's state, each by its own rank.

A rank writes into the directory of the checkpoint if it can. Ranks on hosts that do not share this directory
send their shards to rank 0, which writes them as they arrive.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_core.checkpoint.format import Progress, tensors_file
from fm_core.checkpoint.optimizer_shards import shard_name, shard_tensors
from fm_core.checkpoint.tensor_layout import PIECE_ELEMENTS, ShardRange, TensorLayout
from fm_core.checkpoint.weights_file import write_tensors
from fm_core.checkpoint.writer import CheckpointWriter, Result, SaveProblem, attempt
from fm_core.run.directory import step_name


@dataclass(frozen=True)
class RankCopies:
    """One rank's copies of its shards, and its way to the other ranks."""

    group: Any
    """Process group of all ranks; None if there is one rank."""
    rank: int
    ranks: int
    layout: TensorLayout
    copies: Mapping[str, Sequence[Tensor]]
    """Copies of this rank's shards by part."""
    progress: Progress

    def content(self, part: str, pieces: Sequence[ShardRange]) -> Iterator[Tensor]:
        """On rank 0 the content of these pieces, in order; the other ranks send theirs to it."""
        received = torch.empty(PIECE_ELEMENTS)
        for piece in pieces:
            if piece.rank != self.rank and self.rank:
                continue
            self.progress(f"sending {part}" if self.rank else f"gathering {part}")
            if piece.rank != self.rank:
                dist.recv(received[: piece.count], src=piece.rank, group=self.group)
                yield received[: piece.count]
            elif self.rank:
                dist.send(self._copy_of(part, piece), dst=0, group=self.group)
            else:
                yield self._copy_of(part, piece)

    def shard(self, parts: Sequence[str], rank: int) -> Iterator[Tensor]:
        """The content of a rank's file: of this rank, or on rank 0 also of one that sends it."""
        for part in parts:
            pieces = self.layout.pieces_of(rank)
            if rank == self.rank:
                yield from (self._copy_of(part, piece) for piece in pieces)
            else:
                yield from self.content(part, pieces)

    def send(self, parts: Sequence[str]) -> None:
        """Send the content of this rank's file to rank 0."""
        for part in parts:
            for _ in self.content(part, self.layout.pieces_of(self.rank)):
                pass

    def _copy_of(self, part: str, piece: ShardRange) -> Tensor:
        return self.copies[part][piece.shard][piece.offset :][: piece.count]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, on each of them."""
        values: list[Any] = [value]
        if self.group:
            values = [None] * self.ranks
            dist.all_gather_object(values, value, group=self.group)
        return values


def write_shards(
    here: RankCopies,
    writer: CheckpointWriter | None,
    step: int,
    parts: Sequence[str],
    metadata: Mapping[str, str],
) -> Result:
    """Write a file per rank with its fragments of `parts`; return on rank 0 the first problem of any rank.

    All ranks must call it. `writer` is given on rank 0 only, and None if the checkpoint has failed already:
    then nothing is written.
    """
    folder = here.gathered(str(writer.directory(step).absolute()) if writer else None)[0]
    if folder is None:
        return None
    writes = here.gathered(here.rank == 0 or os.access(folder, os.W_OK | os.X_OK))

    def tensors(rank: int) -> dict[str, Tensor]:
        return shard_tensors(parts, here.layout.fragments[rank])

    result: Result = None
    facts = dict[str, dict[str, Any]]()
    if writer:
        for rank in (rank for rank in range(here.ranks) if rank == 0 or not writes[rank]):
            name, content = shard_name(rank, here.ranks), here.shard(parts, rank)
            write = partial(writer.write, step, name, tensors(rank), metadata, content)
            result = result or attempt(write)
            for _ in content:  # also after a failure, because the other rank sends the rest
                pass
    elif writes[here.rank]:
        name, content = shard_name(here.rank, here.ranks), here.shard(parts, here.rank)
        try:
            written = write_tensors(Path(folder), name, tensors(here.rank), metadata, here.progress, content)
            facts[tensors_file(name)] = written
        except OSError as error:
            result = SaveProblem.of(error, Path(folder).parent / step_name(step))
    else:
        here.send(parts)
    here.progress("waiting for the shards of the other ranks")
    outcomes = here.gathered((result, facts))
    if writer:
        for _, facts in outcomes:
            writer.record(facts)
        theirs = next((problem for problem, _ in outcomes[1:] if problem), None)
        result = result or (attempt(lambda: writer.explained(theirs)) if theirs else None)
    return result
