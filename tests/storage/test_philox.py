"""Philox 4x32-10: published answers, and that a number depends on nothing but its counter."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_core.storage import philox
from fm_core.storage.philox import DOMAINS, KINDS, PURPOSES, WORD, draw, purpose_word, round_keys

KNOWN_ANSWERS = [
    # Random123, examples/kat_vectors: counter, key, result of philox4x32 with 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text):
    return [int(word, 16) for word in text.split()]


def words_of(counter, seed):
    return [int(word) for word in philox.philox([torch.tensor([word]) for word in counter], round_keys(seed))]


def in_python(counter, seed):
    """The definition, in integers of any size."""
    counter, key = list(counter), [seed & WORD, seed >> 32]
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & WORD,
            (left >> 32) ^ counter[3] ^ key[1],
            left & WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_published_answers_are_reproduced(counter, key, result):
    low, high = hexadecimal(key)
    assert words_of(hexadecimal(counter), low | high << 32) == hexadecimal(result)


word = st.integers(0, WORD)


@settings(deadline=None, max_examples=200)
@given(counter=st.tuples(word, word, word, word), seed=st.integers(0, 2**64 - 1))
def test_every_word_is_that_of_the_definition(counter, seed):
    assert words_of(counter, seed) == in_python(counter, seed)


def test_counters_that_broadcast_give_the_words_of_the_full_ones():
    generator = random.Random(0)
    rows, columns = ([generator.randrange(2**32) for _ in range(count)] for count in (3, 5))
    parts = [torch.tensor([columns]), torch.tensor(rows)[:, None], torch.tensor([[7]]), torch.tensor([[9]])]
    words = philox.philox(parts, round_keys(11))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            assert [int(word[i, j]) for word in words] == in_python([column, row, 7, 9], 11)


def test_no_two_purposes_share_a_word_of_the_counter():
    words = {
        purpose_word(domain, purpose, kind, index)
        for domain in DOMAINS
        for purpose in PURPOSES
        for kind in KINDS
        for index in (0, 1, 2**16 - 1)
    }
    assert len(words) == len(DOMAINS) * len(PURPOSES) * len(KINDS) * 3
    assert all(0 <= word <= WORD for word in words)


def test_an_example_is_made_of_its_own_counters():
    """Element e is word e % 4 of block e // 4, of which a uniform number has the upper 24 bits."""
    seed, position = 2**40 + 5, 2**33 + 6
    numbers = draw(seed, "held-out", "time", "uniform", 3, torch.tensor([position]), (2, 5))[0].flatten()
    purpose = purpose_word("held-out", "time", "uniform", 3)
    for element, number in enumerate(numbers):
        counter = [element // 4, position & WORD, position >> 32, purpose]
        assert float(number) == (in_python(counter, seed)[element % 4] >> 8) / 2**24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 3, 7, 64])
def test_numbers_do_not_depend_on_how_many_are_computed_at_a_time(kind, limit, monkeypatch):
    positions = torch.tensor([5, 0, 2**40, 7])
    together = draw(1, "training", "noise", kind, 0, positions, (3, 6))
    monkeypatch.setattr(philox, "CPU_BLOCKS", limit)
    assert torch.equal(draw(1, "training", "noise", kind, 0, positions, (3, 6)), together)


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_does_not_depend_on_the_shape(kind):
    positions = torch.tensor([3, 4])
    longest = draw(1, "samples", "noise", kind, 0, positions, (41,))
    for shape in ((), (1,), (2, 3), (4,), (5,), (8, 5)):
        part = draw(1, "samples", "noise", kind, 0, positions, shape).reshape(2, -1)
        assert torch.equal(part, longest[:, : part.shape[1]])


def test_the_smallest_and_largest_words_give_finite_normal_numbers():
    out = torch.empty(3, 4)
    words = [
        torch.tensor(column) for column in ([0, WORD, WORD], [0, 0, WORD], [1, 2**31, 0], [WORD, 1, 2**30])
    ]
    philox._fill_normal(out, words)
    assert out.isfinite().all()
    assert float(out[0, 0]) == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)  # of 2^-33
    assert out[1, :2].abs().max() == 0


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**16)])
def test_seeds_and_indices_out_of_range_are_refused(seed, index):
    with pytest.raises(ValueError, match="must lie in"):
        draw(seed, "training", "noise", "normal", index, torch.tensor([0]), ())


def test_no_positions_and_empty_examples_give_empty_tensors():
    assert draw(0, "training", "noise", "normal", 0, torch.empty(0, dtype=torch.int64), (3, 2)).shape == (
        0,
        3,
        2,
    )
    assert draw(0, "training", "noise", "normal", 0, torch.tensor([1, 2]), (0,)).shape == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_numbers_are_those_of_the_definition(kind, compiler):
    for positions, shape in (([5, 2**40 + 1, 0], (3, 5, 7)), ([*range(40)], ())):
        arguments = (3, "training", "noise", kind, 0, torch.tensor(positions), shape)
        expected, compiled = draw(*arguments), draw(*arguments, compiled=True)
        if kind == "normal":
            torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(compiled, expected)
