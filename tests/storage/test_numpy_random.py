"""The generator of earlier versions gives the numbers that it always gave."""

import itertools

import pytest
import torch

from fm_core.storage.keyed_random import Domain, KeyedRandom, Purpose
from fm_core.storage.numpy_random import PURPOSES, rows

EDGES = torch.tensor([0, 2**63 - 1])
RECORDED = {
    "normal": torch.tensor([[-0.38628975, 0.40037218, 0.94389981], [0.24009052, 1.07069373, 0.95851094]]),
    "uniform": torch.tensor([[0.69027787, 0.24011320, 0.47920513], [0.26902604, 0.88646889, 0.04317802]]),
    "sign": torch.tensor([[1.0, 1, -1, -1, -1, -1], [1, 1, -1, 1, -1, -1]]),
}


@pytest.mark.parametrize("kind", RECORDED)
def test_the_numbers_themselves_do_not_change(kind):
    # A new numpy that changed its stream would silently change every earlier run that is resumed with it.
    expected = RECORDED[kind]
    numbers = rows(0, "golden", kind, EDGES, expected.shape[1:])
    torch.testing.assert_close(numbers, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("domain", "purpose", "index", "name"),
    [
        (Domain.TRAINING, Purpose.NOISE, 0, "noise"),
        (Domain.TRAINING, Purpose.DEQUANTIZATION, 0, "dequantise"),
        (Domain.TRAINING, Purpose.TIME, 0, "time"),
        (Domain.TRAINING, Purpose.FLIP, 0, "flip"),
        (Domain.TRAINING, Purpose.LABEL_DROPOUT, 0, "label"),
        (Domain.HELD_OUT, Purpose.NOISE, 0, "noise"),
        (Domain.SAMPLES, Purpose.NOISE, 0, "sample-noise"),
        (Domain.SAMPLES, Purpose.CLASS, 0, "sample-label"),
        (Domain.LIKELIHOOD, Purpose.DEQUANTIZATION, 2, "likelihood-draw-2"),
        (Domain.LIKELIHOOD, Purpose.PROBE, 1, "likelihood-probe-1"),
        (Domain.TOY2D, Purpose.DATA, 0, "plane-data"),
        (Domain.TOY2D_SCORING, Purpose.DATA, 0, "plane-held-out"),
        (Domain.TOY2D_SCORING, Purpose.NOISE, 0, "plane-samples"),
    ],
)
def test_a_purpose_has_the_key_that_it_always_had(domain, purpose, index, name):
    random = KeyedRandom("numpy-v1", 5, domain)
    assert torch.equal(
        random.normal(purpose, [3], (4,), index=index), rows(5, name, "normal", EDGES * 0 + 3, (4,))[:1]
    )


def test_only_held_out_losses_share_a_key_with_another_domain():
    shared = [
        {one, other} for one, other in itertools.combinations(PURPOSES, 2) if PURPOSES[one] == PURPOSES[other]
    ]
    assert shared == [
        {("training", name), ("held-out", name)} for name in ("noise", "time", "dequantization")
    ]


def test_seeds_may_be_any_integers():
    for seed in (-(2**70), 2**70):
        assert KeyedRandom("numpy-v1", seed, Domain.SAMPLES).normal(Purpose.NOISE, [0], (2,)).isfinite().all()
