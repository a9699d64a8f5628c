import math

import pytest

from fm_core.config import TrainSection
from fm_core.training.ema import ema_decay
from fm_core.training.lr_schedule import learning_rate


def train(**keys):
    return TrainSection.model_validate({"images": 1000, "learning_rate": 0.5, **keys})


def test_the_rate_rises_linearly_from_zero_to_its_peak():
    section = train(warmup_images=100)
    assert learning_rate(section, 0) == 0
    assert learning_rate(section, 25) == 0.125
    assert learning_rate(section, 99) == pytest.approx(0.495)
    assert learning_rate(section, 100) == 0.5


def test_without_warm_up_the_first_step_has_the_peak():
    for schedule in ("constant", "linear", "cosine"):
        assert learning_rate(train(schedule=schedule), 0) == 0.5


def test_constant_stays():
    assert {learning_rate(train(), seen) for seen in range(0, 2000, 100)} == {0.5}


def test_linear_falls_evenly_to_zero():
    section = train(schedule="linear", warmup_images=200)
    assert [learning_rate(section, seen) for seen in (200, 600, 1000)] == pytest.approx([0.5, 0.25, 0.0])


def test_cosine_falls_by_half_a_wave():
    section = train(schedule="cosine")
    for seen in range(0, 1001, 50):
        expected = 0.25 * (1 + math.cos(math.pi * seen / 1000))
        assert learning_rate(section, seen) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_past_the_end_the_rate_stays_at_zero(schedule):
    section = train(schedule=schedule)
    assert learning_rate(section, 1000) == learning_rate(section, 5000) == pytest.approx(0.0, abs=1e-12)


def test_warm_up_over_the_entire_run():
    section = train(schedule="cosine", warmup_images=1000)
    assert learning_rate(section, 999) == pytest.approx(0.4995)
    assert learning_rate(section, 1000) == 0.5


def test_the_average_forgets_the_initial_weights_early():
    assert ema_decay(0.999, 0, warmup=True) == pytest.approx(0.1)
    assert ema_decay(0.999, 90, warmup=True) == pytest.approx(0.91)
    assert ema_decay(0.999, 10**6, warmup=True) == 0.999
    assert ema_decay(0.999, 0, warmup=False) == 0.999
    # The weight that the initial weights have left after 100 steps.
    assert math.prod(ema_decay(0.999, step, warmup=True) for step in range(100)) < 1e-9
