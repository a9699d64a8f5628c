"""Pieces of shards and the tensors that they make up, for partitions as under ZeRO 1 and under ZeRO 3."""

import itertools

import pytest
import torch

from fm_core.checkpoint import tensor_layout
from fm_core.checkpoint.tensor_layout import Fragment, ShardRange, TensorLayout

SHAPES = {"a": (3, 5), "b": (7,), "c": ()}
TENSORS = {"a": torch.arange(15.0).view(3, 5), "b": torch.arange(15.0, 22.0), "c": torch.tensor(22.0)}


def flat_partitions(ranks):
    """All tensors in a row, cut into equal parts, the last one padded."""
    flat = torch.cat([tensor.flatten() for tensor in TENSORS.values()])
    size = -(-len(flat) // ranks)
    shards = [[flat[rank * size :][:size]] for rank in range(ranks)]
    fragments, first = [[] for _ in range(ranks)], 0
    for name, tensor in TENSORS.items():
        for rank in range(ranks):
            start, end = max(first, rank * size), min(first + tensor.numel(), (rank + 1) * size)
            if start < end:
                fragments[rank].append(Fragment(name, start - first, end - start, 0, start - rank * size))
        first += tensor.numel()
    return shards, fragments


def partitions_of_each(ranks):
    """Each tensor cut into equal parts; a rank has those of b in a second shard."""
    shards, fragments = [[[], []] for _ in range(ranks)], [[] for _ in range(ranks)]
    for name, tensor in TENSORS.items():
        size, number = -(-tensor.numel() // ranks), int(name == "b")
        for rank in range(ranks):
            part = tensor.flatten()[rank * size :][:size]
            offset = len(shards[rank][number])
            if len(part):
                fragments[rank].append(Fragment(name, rank * size, len(part), number, offset))
            shards[rank][number].extend([*part.tolist(), *[-1.0] * (size - len(part))])
    return [[torch.tensor(shard) for shard in own] for own in shards], fragments


@pytest.mark.parametrize("largest", [1, 2, 2**22])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("partition", [flat_partitions, partitions_of_each])
def test_the_pieces_in_order_are_the_tensors_in_order(monkeypatch, partition, ranks, largest):
    monkeypatch.setattr(tensor_layout, "PIECE_ELEMENTS", largest)
    shards, fragments = partition(ranks)
    layout = TensorLayout.of(SHAPES, fragments)
    assert max(piece.count for piece in layout.pieces) <= largest
    content = torch.cat([shards[p.rank][p.shard][p.offset :][: p.count] for p in layout.pieces])
    assert content.tolist() == [*itertools.chain(*(tensor.flatten().tolist() for tensor in TENSORS.values()))]
    assert [(name, tensor.shape) for name, tensor in layout.empty_tensors().items()] == [*SHAPES.items()]


def test_a_rank_sends_what_is_adjacent_in_one_piece():
    _, fragments = flat_partitions(2)
    layout = TensorLayout.of(SHAPES, fragments)
    assert layout.pieces == (ShardRange(0, 0, 0, 12), ShardRange(1, 0, 0, 11))
    assert [layout.pieces_of(rank) for rank in range(2)] == [
        (ShardRange(0, 0, 0, 12),),
        (ShardRange(1, 0, 0, 11),),
    ]


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ([Fragment("a", 0, 4, 0, 0)], "ZeRO has 4 float32 weights for a, not 5"),
        (
            [Fragment("a", 0, 3, 0, 0), Fragment("a", 2, 3, 0, 3)],
            "weight, or two, for a at element 3",
        ),
        ([Fragment("a", 1, 4, 0, 0)], "weight, or two, for a at element 0"),
        ([], "ZeRO has 0 float32 weights for a, not 5"),
    ],
)
def test_tensors_that_are_not_covered_once_are_refused(own, problem):
    with pytest.raises(RuntimeError, match=problem):
        TensorLayout.of({"a": (5,)}, [own])
