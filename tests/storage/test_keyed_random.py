"""Randomness as a function of (seed, purpose, index)."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fm_core.storage.keyed_random import normal, rademacher, uniform

KINDS = [normal, uniform, rademacher]
indices = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6)
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@settings(deadline=None, max_examples=20)
@given(indices=indices, shape=st.sampled_from([(), (3,), (2, 3, 5)]), seed=st.integers(-(2**70), 2**70))
def test_a_row_does_not_depend_on_the_batch(kind, indices, shape, seed):
    batch = kind(seed, "x", indices, shape)
    assert batch.shape == (len(indices), *shape)
    assert batch.dtype == torch.float32
    for row, index in zip(batch, indices, strict=True):
        assert torch.equal(row, kind(seed, "x", torch.tensor([index]), shape)[0])


@kinds
def test_seeds_purposes_and_indices_all_matter(kind):
    reference = kind(1, "noise", [5], (64,))
    for other in (kind(2, "noise", [5], (64,)), kind(1, "time", [5], (64,)), kind(1, "noise", [6], (64,))):
        assert not torch.equal(reference, other)


def test_kinds_of_number_do_not_share_bits():
    u, z = uniform(1, "x", range(4000), ()), normal(1, "x", range(4000), ())
    signs = rademacher(1, "x", range(4000), (32,))  # all the bits that the first number could be made of
    table = torch.corrcoef(torch.cat([torch.stack([u, z, z.abs()]), signs.T]))
    table[1, 2] = table[2, 1] = 0
    assert (table - torch.eye(35)).abs().max() < 5 / 4000**0.5


def test_adjacent_indices_share_no_part_of_the_stream():
    rows = uniform(1, "x", range(20), (300,))
    for low, high in pairwise(rows):
        assert torch.isin(high, low).sum() < 5  # by chance: 300 * 300 / 2^24


@kinds
@pytest.mark.parametrize("apart", [1, 2, 256, 2**32])
def test_nearby_indices_are_not_correlated(kind, apart):
    low = kind(3, "x", [7 + 10 * apart * n for n in range(40)], (500,))
    high = kind(3, "x", [7 + 10 * apart * n + apart for n in range(40)], (500,))
    for shift in (0, 1):  # element by element, and one apart
        a, b = low[:, : 500 - shift].flatten(), high[:, shift:].flatten()
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / len(a) ** 0.5


def test_the_numbers_have_their_distributions():
    assert stats.kstest(normal(0, "x", range(50), (400,)).flatten().numpy(), "norm").pvalue > 1e-3
    u = uniform(0, "x", range(50), (400,)).flatten()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert u.min() >= 0
    assert u.max() < 1
    s = rademacher(0, "x", range(50), (401,))
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(s.mean())) < 4 / s.numel() ** 0.5


def test_the_numbers_themselves_do_not_change():
    # A new numpy that changed its stream would silently change every run that is resumed with it.
    torch.testing.assert_close(normal(0, "golden", [0, 2**63 - 1], (3,)), GOLDEN["normal"], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        uniform(0, "golden", [0, 2**63 - 1], (3,)), GOLDEN["uniform"], rtol=0, atol=1e-7
    )
    assert torch.equal(rademacher(0, "golden", [0, 2**63 - 1], (6,)), GOLDEN["rademacher"])


GOLDEN = {
    "normal": torch.tensor([[-0.38628975, 0.40037218, 0.94389981], [0.24009052, 1.07069373, 0.95851094]]),
    "uniform": torch.tensor([[0.69027787, 0.24011320, 0.47920513], [0.26902604, 0.88646889, 0.04317802]]),
    "rademacher": torch.tensor([[1.0, 1, -1, -1, -1, -1], [1, 1, -1, 1, -1, -1]]),
}


@pytest.mark.parametrize("index", [-1, 2**63])
def test_indices_out_of_range_are_refused(index):
    with pytest.raises(ValueError, match="index"):
        normal(0, "x", [index], (2,))
