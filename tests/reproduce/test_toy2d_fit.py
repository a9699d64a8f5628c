from functools import partial

import pytest
import torch

from fm_core.config import Toy2dSection
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.method.registry import objective_named, path_named
from fm_core.reproduce.toy2d.fit import draw, fit, initial_network
from fm_core.storage.keyed_random import CURRENT, Domain, KeyedRandom

SMALL = Toy2dSection(steps=30, batch=32, width=16, layers=2)
PAIRS = [
    ("noise-prediction", "variance-preserving"),
    ("score-matching", "variance-preserving"),
    ("scoreflow", "variance-preserving"),
    ("flow-matching", "variance-preserving"),
    ("flow-matching", "optimal-transport"),
    ("maximum-likelihood", "optimal-transport"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    with cpu_threads(1):
        yield


def random(seed):
    return KeyedRandom(CURRENT, seed, Domain.TOY2D)


def objective(name, path):
    return objective_named(name, path_named(path))


def examples(trained_objective, seed=0):
    return partial(draw, trained_objective, random(seed))


def quantile(sample, interval):
    return (sample.t - interval[0]) / (interval[1] - interval[0])


def test_every_objective_sees_the_same_data_noise_and_quantiles():
    first = draw(objective(*PAIRS[0]), random(0), 64, 40)
    for pair in PAIRS[1:]:
        other = objective(*pair)
        sample = draw(other, random(0), 64, 40)
        assert torch.equal(sample.x0, first.x0)
        assert torch.equal(sample.x1, first.x1)
        assert torch.allclose(quantile(sample, other.interval), quantile(first, (0, 1 - 1e-5)), atol=1e-6)


def test_a_step_trains_on_the_positions_after_those_of_the_step_before(monkeypatch):
    seen = []
    trained_objective = objective("flow-matching", "optimal-transport")
    loss = trained_objective.loss
    monkeypatch.setattr(
        trained_objective, "loss", lambda network, sample: (seen.append(sample.x1), loss(network, sample))[1]
    )
    fit(
        initial_network(SMALL, 0),
        trained_objective,
        SMALL,
        3,
        examples(trained_objective, 7),
        lambda *_: None,
    )
    assert torch.equal(torch.cat(seen), draw(trained_objective, random(7), 0, 96).x1)


def test_initial_weights_depend_only_on_the_seed_and_do_not_advance_torchs_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (initial_network(SMALL, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a.first.weight, b.first.weight)
    assert not torch.equal(a.first.weight, c.first.weight)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_training_brings_the_loss_of_fresh_points_down_and_is_repeatable(pair):
    trained_objective, steps = objective(*pair), 10 if pair[0] == "maximum-likelihood" else 300
    settings = SMALL.model_copy(update={"learning_rate": 1e-2, "batch": 64, "width": 32})
    networks = [initial_network(settings, 0) for _ in range(3)]
    losses = [
        fit(network, trained_objective, settings, steps, examples(trained_objective), lambda *_: None)
        for network in networks[:2]
    ]
    assert losses[0] == losses[1]
    fresh = draw(trained_objective, random(0), 10**6, 2048)
    trained, again, initial = (trained_objective.loss(network, fresh).mean().item() for network in networks)
    assert trained == again
    assert trained < 0.995 * initial


def test_the_loss_curve_holds_every_step_once():
    losses = []
    loss_curve = fit(
        initial_network(SMALL, 0),
        objective("flow-matching", "optimal-transport"),
        SMALL,
        30,
        examples(objective("flow-matching", "optimal-transport")),
        lambda step, loss: losses.append((step, loss)),
    )
    assert [step for step, _ in losses] == list(range(1, 31))
    assert loss_curve == pytest.approx([loss for _, loss in losses])


def test_the_learning_rate_falls_to_zero_along_half_a_cosine(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    fit(
        initial_network(SMALL, 0),
        objective("flow-matching", "optimal-transport"),
        SMALL,
        4,
        examples(objective("flow-matching", "optimal-transport")),
        lambda *_: None,
    )
    assert rates == pytest.approx([2e-3 * share for share in (1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4)])


def test_a_loss_that_is_not_finite_stops_the_training():
    trained_objective = objective("flow-matching", "optimal-transport")
    network = initial_network(SMALL, 0)
    with torch.no_grad():
        network.last.bias.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="step 1"):
        fit(network, trained_objective, SMALL, 3, examples(trained_objective), lambda *_: None)
