"""Power-function EMA against its closed forms, and post-hoc EMA of any width from two stored ones."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.train_state import TrainState
from fm_core.config import RunConfig, TrainSection
from fm_core.errors import UserError
from fm_core.training.ema import (
    Profile,
    combination,
    ema_decays,
    mismatch,
    power_decay,
    power_exponent,
    power_name,
)
from fm_core.training.posthoc_ema import average_file, reconstruct

STORED = (0.05, 0.1)
STEPS = 400


def weights_of(step):
    """What training might do: a slow drift and noise."""
    generator = torch.Generator().manual_seed(step)
    drift = torch.tensor([np.sin(step / 60), np.log1p(step), 1.0], dtype=torch.float64)
    return drift + 0.3 * torch.randn(3, generator=generator, dtype=torch.float64)


def trained(width, steps):
    """The average that training would hold after this many steps."""
    average = torch.full((3,), 1e6, dtype=torch.float64)  # initial weights, which must not count
    for step in range(steps):
        decay = power_decay(power_exponent(width), step)
        average = decay * average + (1 - decay) * weights_of(step + 1)
    return average


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.15, 0.25, 0.28])
def test_a_width_is_the_standard_deviation_of_its_profile(width):
    exponent = power_exponent(width)
    x = np.linspace(0, 1, 2_000_001)
    density = (exponent + 1) * x**exponent
    mean = np.trapezoid(density * x, x)
    deviation = np.sqrt(np.trapezoid(density * (x - mean) ** 2, x))
    assert deviation == pytest.approx(width, rel=1e-5)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_an_update_weighs_every_step_by_its_share_of_the_profile(width):
    exponent, steps = power_exponent(width), 50
    edges = (np.arange(steps + 1) / steps) ** (exponent + 1)
    expected = sum(share * weights_of(step + 1) for step, share in enumerate(np.diff(edges)))
    assert torch.allclose(trained(width, steps), expected, rtol=1e-10)


@pytest.mark.parametrize("width", [0, -0.1, 0.3, 1.0])
def test_a_width_that_no_profile_has_is_refused(width):
    with pytest.raises(ValueError, match="between 0 and"):
        power_exponent(width)


def profiles(*steps):
    return [Profile(step, power_exponent(width)) for step in steps for width in STORED]


@pytest.mark.parametrize("which", range(6))
def test_a_retained_average_is_returned_unchanged(which):
    stored = profiles(100, 200, 300)
    coefficients = combination(stored, stored[which])
    assert mismatch(stored, coefficients, stored[which]) < 1e-4
    assert coefficients == pytest.approx(np.eye(6)[which], abs=1e-3)


def test_more_snapshots_come_nearer():
    target = Profile(400, power_exponent(0.07))
    distances = []
    for every in (400, 200, 100, 50):
        stored = profiles(*range(every, 401, every))
        distances.append(mismatch(stored, combination(stored, target), target))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.05
    assert distances[-1] < 0.02


def config_at(root, **train):
    keys = {"ema_power_widths": STORED, "snapshot_images": 50, **train}
    return RunConfig.model_validate({"run": {"root": str(root), "name": "r"}, "train": keys})


@pytest.fixture
def run(tmp_path):
    config = config_at(tmp_path)
    for applied in range(50, STEPS + 1, 50):
        snapshots = CheckpointCatalog.of(config).snapshots()
        step = applied + 7
        recipe = {"recipe": json.dumps({"model": {"kind": "x"}, "step": step})}
        assert snapshots.begin(step) is None
        for width in STORED:
            tensors = {"w": trained(width, applied).float()}
            assert snapshots.write(step, power_name(width), tensors, recipe) is None
        assert snapshots.finish(TrainState(step=step, applied_steps=applied)) is None
    return config


@pytest.mark.parametrize("width", [0.04, 0.07, 0.1, 0.15, 0.2])
def test_any_width_made_afterwards_is_the_one_that_training_would_have_held(run, width):
    file = reconstruct(run, width)
    assert file == average_file(run, width, 407)
    ours, theirs = load_file(file)["w"].double(), trained(width, STEPS)
    spread = (trained(0.02, STEPS) - trained(0.25, STEPS)).abs()
    assert ((ours - theirs).abs() / spread).max() < 0.1
    with safe_open(file, "pt") as opened:
        recipe = json.loads(opened.metadata()["recipe"])
    assert recipe["average"]["width"] == width
    assert recipe["average"]["mismatch"] < 0.1
    assert recipe["model"] == {"kind": "x"}
    assert recipe["step"] == 407


def test_an_earlier_step_uses_what_was_retained_by_then(run):
    ours = load_file(reconstruct(run, 0.08, step=207))["w"].double()
    spread = (trained(0.02, 200) - trained(0.25, 200)).abs()
    assert ((ours - trained(0.08, 200)).abs() / spread).max() < 0.05


def test_what_cannot_be_made_is_refused_in_one_line(run, tmp_path):
    for attempt, message in (
        (lambda: reconstruct(run, 0.5), "between 0 and"),
        (lambda: reconstruct(run, 0.1, step=50), "no snapshot of step 50; there are: 57, 107"),
        (lambda: reconstruct(config_at(tmp_path / "none"), 0.1), "set train.ema_power_widths"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"do not span it \(mismatch 0\.\d+, at most 0\.1\)") as caught:
        reconstruct(run, 0.01, step=57)
    assert "\n" not in str(caught.value)
    assert not average_file(run, 0.01, 57).exists()
    damaged = tmp_path / "r" / "train" / "checkpoints" / "snapshots" / "step-00000107"
    (damaged / "ema-power-0.05.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="has 1 bytes"):
        reconstruct(run, 0.1)


def test_every_average_of_a_run_has_its_name():
    train = TrainSection(ema_decays=(0.999, 0.9), ema_power_widths=(0.05, 0.1))
    assert [*ema_decays(train)] == ["ema-0.999", "ema-0.9", "ema-power-0.05", "ema-power-0.1"]
    for keys in ({"ema_power_widths": [0.3]}, {"snapshot_images": 100}):
        with pytest.raises(ValueError, match="ema_power_widths"):
            TrainSection.model_validate(keys)
