import math
from typing import get_args

import pytest
import torch

from fm_core.reproduce.toy2d.checkerboard import (
    BLOCK,
    ENTROPY,
    by_position,
    cell_distance,
    checkerboard,
    expected_distance,
    grid_centers,
    on_squares,
    points,
)
from fm_core.storage.keyed_random import CURRENT, Domain, GeneratorName, KeyedRandom, Purpose


def test_points_fill_eight_squares_evenly_and_nothing_else():
    x = points(KeyedRandom(CURRENT, 0, Domain.TOY2D), 0, 16_000)
    assert on_squares(x).all()
    squares, counts = (x / 2).floor().unique(dim=0, return_counts=True)
    assert len(squares) == 8
    assert (squares.sum(1) % 2 == 0).all()
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)
    inside = (x / 2) % 1
    assert torch.allclose(inside.mean(0), torch.full((2,), 0.5), atol=0.01)
    assert torch.allclose(inside.var(0), torch.full((2,), 1 / 12), atol=0.003)


def test_corners_of_the_unit_square_stay_on_the_board():
    almost = 1 - 2**-24
    u = torch.tensor([[a, b] for a in (0, 0.25, 0.5, almost) for b in (0, 0.5, almost)])
    assert on_squares(checkerboard(u)).all()


def test_points_off_the_squares_and_off_the_board_are_recognized():
    x = torch.tensor([[-3.0, -3.0], [-1.0, -3.0], [5.0, 5.0], [-5.0, 1.0], [3.0, 3.0]])
    assert on_squares(x).tolist() == [True, False, False, False, True]


def test_the_entropy_is_the_logarithm_of_the_area():
    x, y = grid_centers(400)
    area = on_squares(torch.stack([x, y], dim=-1).view(-1, 2)).float().mean() * 100
    assert area.log() == pytest.approx(ENTROPY, abs=1e-3)


def test_grid_rows_go_by_y():
    x, y = grid_centers(4)
    assert torch.equal(x[0], x[1])
    assert torch.equal(y[:, 0], x[0])
    assert x[0].tolist() == [-3.75, -1.25, 1.25, 3.75]


@pytest.mark.parametrize("generator", get_args(GeneratorName))
@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_position_gets_the_same_number_in_any_batch(shape, generator):
    random, other = (KeyedRandom(generator, seed, Domain.TOY2D) for seed in (3, 4))
    complete = by_position(random.normal, Purpose.NOISE, 0, 5 * BLOCK, shape)
    for first, count in [(0, 1), (5, 7), (BLOCK - 1, 2), (BLOCK, BLOCK), (100, 150), (2 * BLOCK, 3 * BLOCK)]:
        part = by_position(random.normal, Purpose.NOISE, first, count, shape)
        assert torch.equal(part, complete[first : first + count])
    assert not torch.equal(complete, by_position(other.normal, Purpose.NOISE, 0, 5 * BLOCK, shape))
    assert not torch.equal(complete, by_position(random.normal, Purpose.TIME, 0, 5 * BLOCK, shape))


def test_the_distance_is_half_the_difference_of_the_shares_of_cells():
    def centers(step):
        axis = torch.arange(-4 + step / 2, 4, step)
        x, y = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack([x, y], dim=-1).view(-1, 2)

    board = centers(1.0)[on_squares(centers(1.0))]
    assert len(board) == 32
    assert cell_distance(board) == pytest.approx(0)
    # Half of a uniform distribution lies beside the squares, and so does each quarter that is moved away.
    assert cell_distance(centers(0.5)) == pytest.approx(0.5)
    assert cell_distance(torch.cat([board[8:], board[:8] + 100])) == pytest.approx(0.25)
    assert cell_distance(board[:1].expand(7, 2)) == pytest.approx(31 / 32)
    assert cell_distance(board[:16]) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [300, 3_000])
def test_points_of_the_board_have_the_expected_distance(count):
    generator = torch.Generator().manual_seed(count)
    distances = [cell_distance(checkerboard(torch.rand(count, 2, generator=generator))) for _ in range(60)]
    assert sum(distances) / 60 == pytest.approx(expected_distance(count), rel=0.05)
