"""Couplings and timestep samplers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fm_core.errors import UserError
from fm_core.method.couplings import Independent
from fm_core.method.minibatch_ot import MinibatchOptimalTransport
from fm_core.method.timestep_samplers import EDMSkewed, LogitNormal, Uniform


def batch(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, *shape, generator=generator)


def test_independent_leaves_everything_as_it_was():
    x0, x1 = batch(5, 2)
    label = torch.arange(5)
    paired = Independent().pair(x0, x1, label)
    assert paired[0] is x0
    assert paired[1] is x1
    assert paired[2] is label
    Independent().check(micro_batch=7, first_position=3)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000))
def test_the_assignment_is_the_best_of_all_permutations(seed):
    x0, x1 = batch(5, 1, 2, seed=seed)
    paired, _, _ = MinibatchOptimalTransport(block=5).pair(x0, x1)
    cost = float((x1 - paired).square().sum())
    best = min(float((x1 - x0[list(order)]).square().sum()) for order in itertools.permutations(range(5)))
    assert cost == pytest.approx(best, rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(blocks=st.integers(1, 4), block=st.integers(2, 9), shape=st.sampled_from([(), (3,), (2, 2, 2)]))
def test_each_block_is_a_permutation_and_the_data_stay_in_place(blocks, block, shape):
    x0, x1 = batch(blocks * block, *shape)
    label = torch.arange(blocks * block)
    paired, data, labels = MinibatchOptimalTransport(block=block).pair(x0, x1, label)
    assert data is x1
    assert labels is label
    for start in range(0, len(x0), block):
        part = slice(start, start + block)
        before, after = (
            x0[part].flatten(1) if shape else x0[part, None],
            paired[part].flatten(1) if shape else paired[part, None],
        )
        assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))


def test_the_pairing_does_not_depend_on_the_number_of_processes():
    x0, x1 = batch(32, 3)
    coupling = MinibatchOptimalTransport(block=8)
    expected = coupling.pair(x0, x1)[0]
    for processes in (2, 4):
        share = 32 // processes
        parts = [coupling.pair(x0[i : i + share], x1[i : i + share])[0] for i in range(0, 32, share)]
        assert torch.equal(torch.cat(parts), expected)
    assert not torch.equal(expected, x0)


def test_a_micro_batch_without_complete_blocks_is_refused():
    coupling = MinibatchOptimalTransport(block=8)
    x0, x1 = batch(12, 3)
    with pytest.raises(UserError, match="must be multiples of 8"):
        coupling.pair(x0, x1)
    with pytest.raises(UserError, match="position 4"):
        coupling.check(micro_batch=16, first_position=4)
    coupling.check(micro_batch=16, first_position=24)
    with pytest.raises(UserError, match="at least 2"):
        MinibatchOptimalTransport(block=1)


DISTRIBUTIONS = [
    (Uniform(), stats.uniform().cdf),
    (Uniform((0.0, 0.5)), stats.uniform(0, 0.5).cdf),
    (LogitNormal(mean=0.5, std=0.8), lambda t: stats.norm.cdf((torch.logit(torch.as_tensor(t)) - 0.5) / 0.8)),
    (EDMSkewed(), lambda t: stats.norm.sf((torch.log(1 / torch.as_tensor(t) - 1) + 1.2) / 1.2)),
]


@pytest.mark.parametrize(("sampler", "cdf"), DISTRIBUTIONS)
def test_times_have_their_distribution(sampler, cdf):
    u = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert stats.kstest(sampler.times(u).numpy(), cdf).pvalue > 1e-3


@settings(deadline=None, max_examples=50)
@given(
    cls=st.sampled_from([Uniform, LogitNormal, EDMSkewed]),
    interval=st.sampled_from([(0.0, 1.0), (0.0, 1 - 1e-5), (0.3, 0.6)]),
    u=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=5),
)
def test_times_stay_in_the_interval_and_rise_with_u(cls, interval, u):
    u = torch.tensor(sorted(u))
    t = cls(interval).times(u)
    assert t.shape == u.shape
    assert t.dtype == torch.float32
    assert (t >= interval[0]).all()
    assert (t <= interval[1]).all()
    assert (t.diff() >= 0).all()


@pytest.mark.parametrize("make", [lambda: LogitNormal(std=0), lambda: EDMSkewed(log_std=-1)])
def test_impossible_times_are_refused(make):
    with pytest.raises(UserError, match="std must be positive"):
        make()
