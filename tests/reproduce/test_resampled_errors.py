"""Draws of errors: from the normal distribution, or from Student's t where the error is of few seeds."""

import random
from dataclasses import replace

import pytest
from scipy import stats

from fm_core.reproduce.claims import Measured, _standard_error

DRAWS = 20_000


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_draws_have_the_tails_of_the_number_of_seeds(seeds):
    number = replace(Measured(1.0, 0.1), seeds=seeds)
    rng = random.Random(0)
    draws = [_standard_error(number, rng) for _ in range(DRAWS)]
    expected = stats.norm if seeds == 1 else stats.t(seeds - 1)
    for probability in (0.5, 0.05, 0.01):
        limit = expected.isf(probability / 2)
        share = sum(abs(draw) > limit for draw in draws) / DRAWS
        assert share == pytest.approx(probability, abs=4 * (probability / DRAWS) ** 0.5)
