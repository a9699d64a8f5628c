"""Randomness as a function of (seed, domain, purpose, position, element), with either generator."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fm_core.config.run import GeneratorName as ConfiguredName
from fm_core.errors import UserError
from fm_core.storage import numpy_random, philox
from fm_core.storage.keyed_random import (
    CURRENT,
    UNNAMED,
    Domain,
    GeneratorName,
    KeyedRandom,
    Purpose,
    generator_of,
    generator_record,
)

GENERATORS = get_args(GeneratorName)
LARGE = 2**20
"""Numbers of the tests that look for small deviations."""
positions = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6)
generators = pytest.mark.parametrize("generator", GENERATORS)
kinds = pytest.mark.parametrize("kind", ["normal", "uniform", "sign"])


def drawn(
    kind, where, shape=(), seed=1, domain=Domain.TRAINING, purpose=Purpose.NOISE, generator=CURRENT, **key
):
    return getattr(KeyedRandom(generator, seed, domain), kind)(purpose, where, shape, **key)


def correlation(a, b):
    return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1]))


def test_the_configuration_offers_these_generators():
    assert get_args(ConfiguredName) == GENERATORS


def test_the_keys_are_closed_enumerations():
    assert list(philox.DOMAINS) == list(Domain)
    assert list(philox.PURPOSES) == list(Purpose)
    assert all(domain in [*Domain] and purpose in [*Purpose] for domain, purpose in numpy_random.PURPOSES)


@generators
@kinds
@settings(deadline=None, max_examples=20)
@given(where=positions, shape=st.sampled_from([(), (3,), (2, 3, 5)]), seed=st.integers(0, 2**64 - 1))
def test_a_row_does_not_depend_on_the_batch(kind, generator, where, shape, seed):
    batch = drawn(kind, where, shape, seed, generator=generator)
    assert batch.shape == (len(where), *shape)
    assert batch.dtype == torch.float32
    for row, position in zip(batch, where, strict=True):
        alone = drawn(kind, torch.tensor([position]), shape, seed, generator=generator)
        assert torch.equal(row, alone[0])


@generators
@kinds
def test_everything_in_the_key_matters(kind, generator):
    domain = Domain.LIKELIHOOD  # the only one with several draws for a purpose
    key = {"seed": 1, "domain": domain, "purpose": Purpose.DEQUANTIZATION, "index": 0, "generator": generator}
    reference = drawn(kind, [5], (64,), **key)
    for change in ({"seed": 2}, {"domain": Domain.TRAINING}, {"purpose": Purpose.PROBE}, {"index": 1}):
        assert not torch.equal(reference, drawn(kind, [5], (64,), **key | change))
    assert not torch.equal(reference, drawn(kind, [6], (64,), **key))


@pytest.mark.parametrize("domain", [Domain.HELD_OUT, Domain.SAMPLES, Domain.LIKELIHOOD])
def test_noise_of_other_domains_is_that_of_no_training_image_of_any_seed(domain):
    """Here for a thousand seeds and eight positions; in general because Philox is a bijection of counters."""
    others = torch.cat([drawn("normal", range(8), (4,), seed, domain=domain) for seed in (0, 1)])
    rows = {tuple(row) for row in others.tolist()}
    for seed in range(1000):
        training = {tuple(row) for row in drawn("normal", range(8), (4,), seed).tolist()}
        assert not rows & training


@generators
def test_kinds_of_number_do_not_share_bits(generator):
    u, z = (drawn(kind, range(4000), generator=generator) for kind in ("uniform", "normal"))
    # All the bits that the first number could be made of.
    signs = drawn("sign", range(4000), (32,), generator=generator)
    table = torch.corrcoef(torch.cat([torch.stack([u, z, z.abs()]), signs.T]))
    table[1, 2] = table[2, 1] = 0
    assert (table - torch.eye(35)).abs().max() < 5 / 4000**0.5


@generators
def test_adjacent_positions_do_not_overlap_in_the_stream(generator):
    rows = drawn("uniform", range(20), (300,), generator=generator)
    for low, high in pairwise(rows):
        assert torch.isin(high, low).sum() < 5  # by chance: 300 * 300 / 2^24


@kinds
@pytest.mark.parametrize("apart", [1, 2, 256, 2**32])
def test_positions_are_not_correlated(kind, apart):
    """Element by element, and one, two and four elements apart (the four words of a block)."""
    count, size = 64, LARGE // 64
    first = torch.arange(count) * 2 * apart + 7
    low, high = drawn(kind, first, (size,), 3), drawn(kind, first + apart, (size,), 3)
    for shift in (0, 1, 2, 4):
        a, b = low[:, : size - shift], high[:, shift:]
        assert correlation(a, b) < 4.5 / a.numel() ** 0.5
        if shift:
            assert correlation(low[:, : size - shift], low[:, shift:]) < 4.5 / a.numel() ** 0.5


@kinds
def test_seeds_domains_and_purposes_are_not_correlated(kind):
    where, shape = range(64), (LARGE // 64,)
    tables = [
        drawn(kind, where, shape, **key)
        for key in (
            {"seed": 0},
            {"seed": 1},
            {"seed": 2**32},
            {"seed": 0, "domain": Domain.SAMPLES},
            {"seed": 0, "purpose": Purpose.DEQUANTIZATION},
            {"seed": 0, "index": 1},
        )
    ]
    matrix = torch.corrcoef(torch.stack([table.flatten() for table in tables]).double())
    assert (matrix - torch.eye(len(tables))).abs().max() < 5 / LARGE**0.5


def test_two_elements_of_a_pair_are_independent_in_their_squares_too():
    """Box-Muller makes both of one radius and one angle."""
    z = drawn("normal", range(64), (LARGE // 64,)).view(-1, 4)
    for one in range(4):
        for other in range(one):
            assert correlation(z[:, one], z[:, other]) < 4.5 / len(z) ** 0.5
            assert correlation(z[:, one] ** 2, z[:, other] ** 2) < 4.5 / len(z) ** 0.5


def test_normal_numbers_have_their_distribution_and_tails():
    z = drawn("normal", range(256), (LARGE // 64,), seed=5).flatten().double()
    count = len(z)
    assert stats.kstest(z[: LARGE // 2].numpy(), "norm").pvalue > 1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 4.5 * (variance / count) ** 0.5
    for limit in (3.0, 4.0, 4.5):
        for tail in (z > limit, z < -limit):
            expected = count * stats.norm.sf(limit)
            assert abs(int(tail.sum()) - expected) < 5 * math.sqrt(expected) + 1
    assert 5.0 < float(z.abs().max()) < 6.5


def test_uniform_numbers_and_signs_have_their_distribution():
    u = drawn("uniform", range(64), (LARGE // 64,)).flatten()
    assert stats.kstest(u[: LARGE // 2].numpy(), "uniform").pvalue > 1e-3
    assert stats.chisquare(torch.histc(u, 1024, 0, 1).numpy()).pvalue > 1e-3
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).floor())
    s = drawn("sign", range(64), (LARGE // 64,))
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(s.mean())) < 4.5 / s.numel() ** 0.5


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_numbers_of_the_earlier_generator_have_their_distributions(kind):
    numbers = drawn(kind, range(50), (400,), 0, generator=UNNAMED).flatten().numpy()
    assert stats.kstest(numbers, {"normal": "norm"}.get(kind, kind)).pvalue > 1e-3


def test_the_numbers_themselves_do_not_change():
    # Whoever changes them gives the generator a new name.
    where = [0, 2**63 - 1]
    torch.testing.assert_close(drawn("normal", where, (3,), 0), RECORDED["normal"], rtol=0, atol=2e-6)
    assert torch.equal(drawn("uniform", where, (3,), 0), RECORDED["uniform"])
    assert torch.equal(drawn("sign", where, (6,), 0), RECORDED["sign"])


RECORDED = {
    "normal": torch.tensor([[-0.58543628, -0.02119892, 0.54281008], [0.69735807, -0.67854267, -0.04139810]]),
    "uniform": torch.tensor([[16748090, 838574, 14339090], [13319866, 5099358, 2205697]]) / 2**24,
    "sign": torch.tensor([[-1.0, -1, 1, -1, 1, -1], [-1, -1, -1, 1, 1, 1]]),
}


@generators
@pytest.mark.parametrize("where", [[-1], [2**63], torch.tensor([-1]), range(-1, 2)])
def test_positions_out_of_range_are_refused(where, generator):
    with pytest.raises(ValueError, match="position"):
        drawn("normal", where, (2,), generator=generator)


def test_a_file_that_names_no_generator_is_of_the_earlier_one():
    assert generator_of({}, "x") == "numpy-v1"
    assert generator_record("numpy-v1") == {}
    assert generator_of(dict(generator_record("philox-v1")), "x") == "philox-v1"
    with pytest.raises(UserError, match=r"^weights\.safetensors: generator 'other-v3'"):
        generator_of({"generator": "other-v3"}, "weights.safetensors")
