"""The checkerboard of the paper's 2-D experiments.

The board is [-4, 4)^2, as usual: four by four squares of side 2. The distribution is uniform on the eight
squares with an even sum of column and row. Its density is 1/32, and its entropy, log 32 nats = 5 bits, is a
lower bound of every model's negative log-likelihood.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fm_core.storage.keyed_random import KeyedRandom, Purpose

HALF_SIDE = 4.0
SQUARE = 2.0
ENTROPY = math.log(32)
"""Entropy of the distribution, in nats."""
WINDOW = 5.0
"""Figures show [-WINDOW, WINDOW]^2."""
NAME = "checkerboard, 4 x 4 squares on [-4, 4)^2, density 1/32 on eight of them"

CELLS = 32
"""Cells of `cell_distance`: each of the eight squares has 2 x 2."""

BLOCK = 64
"""Number of consecutive positions drawn together; separate draws would cost more than the network."""

Draw = Callable[[Purpose, range, Sequence[int]], Tensor]


def checkerboard(u: Tensor) -> Tensor:
    """Map uniform numbers in [0, 1), [N, 2], to points of the board, [N, 2]."""
    column, pair = (4 * u[:, 0]).floor(), (2 * u[:, 1]).floor()
    x = SQUARE * (4 * u[:, 0] - 2)
    # In this order every sum is exact in float32; in another order, a point could be rounded up to the edge.
    y = SQUARE * ((2 * u[:, 1] - pair) + (2 * pair + column % 2 - 2))
    return torch.stack([x, y], dim=1)


def on_squares(x: Tensor) -> Tensor:
    """Whether each of the points [N, 2] lies where the density is not zero, bool [N]."""
    inside = ((x >= -HALF_SIDE) & (x < HALF_SIDE)).all(1)
    return inside & ((x / SQUARE).floor().sum(1) % 2 == 0)


def cell_distance(x: Tensor) -> float:
    """Total variation distance between points [N, 2] and the board, on CELLS cells, 0 to 1.

    Half the sum of |p_i - 1/32| over the 2 x 2 cells of each of the eight squares, plus half the share of
    points outside of the squares. Points of the board itself have about `expected_distance`.
    """
    inside = x[on_squares(x)].double()  # in float32 the sum below may be rounded up to the next cell
    columns, rows = ((inside + HALF_SIDE) / (SQUARE / 2)).floor().long().unbind(1)
    side = int(4 * HALF_SIDE / SQUARE)
    counts = torch.bincount(columns * side + rows, minlength=side**2).double()
    expected = torch.zeros(side**2, dtype=torch.float64)
    expected[_cells_of_squares()] = 1 / CELLS
    return float((counts / len(x) - expected).abs().sum() + 1 - len(inside) / len(x)) / 2


def expected_distance(count: int) -> float:
    """Mean `cell_distance` of `count` independent points of the board, with normal counts in the cells."""
    p = 1 / CELLS
    return CELLS / 2 * math.sqrt(2 * p * (1 - p) / (math.pi * count))


def _cells_of_squares() -> Tensor:
    """Numbers of the cells that lie on the squares, [CELLS]; number = column x side + row."""
    side = int(4 * HALF_SIDE / SQUARE)
    centers = (torch.arange(side) + 0.5) * SQUARE / 2 - HALF_SIDE
    x, y = torch.meshgrid(centers, centers, indexing="ij")
    return on_squares(torch.stack([x, y], dim=-1).reshape(-1, 2)).nonzero()[:, 0]


def points(random: KeyedRandom, first: int, count: int) -> Tensor:
    """Points first, first + 1, ... of the stream of the board's points, float32 [count, 2]."""
    return checkerboard(by_position(random.uniform, Purpose.DATA, first, count, (2,)))


def by_position(draw: Draw, purpose: Purpose, first: int, count: int, shape: Sequence[int] = ()) -> Tensor:
    """Random numbers of the stream positions first, first + 1, ..., [count, *shape].

    `draw` is a method of a `KeyedRandom`. The numbers of a position depend only on the key of that object,
    the purpose and the position, not on the grouping of positions into batches.
    """
    blocks = range(first // BLOCK, -(-(first + count) // BLOCK))
    rows = draw(purpose, blocks, (BLOCK, *shape)).flatten(0, 1)
    start = first - blocks.start * BLOCK
    return rows[start : start + count]


def grid_centers(side: int) -> tuple[Tensor, Tensor]:
    """The x and y of the centers of side x side grid cells of the window, each [side, side]; rows are y."""
    axis = (torch.arange(side) + 0.5) * (2 * WINDOW / side) - WINDOW
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y
