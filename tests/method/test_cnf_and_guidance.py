"""The maximum-likelihood (CNF) objective and classifier-free guidance."""

import pytest
import torch
from torch import nn

from fm_core.config import MethodSection
from fm_core.errors import UserError
from fm_core.method.cnf_objective import MaximumLikelihood
from fm_core.method.divergence import Exact, Hutchinson
from fm_core.method.guidance import guided_velocity
from fm_core.method.likelihood import log_density
from fm_core.method.objectives import FlowMatching, NoisePrediction, ScoreMatching
from fm_core.method.ode import Solver, solve
from fm_core.method.paths import OptimalTransport, VarianceExploding, VariancePreserving
from fm_core.models.build import build_method

TIGHT = {"rtol": 1e-8, "atol": 1e-8}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2)).double()
        self.seen = []

    def forward(self, t, x, label=None):
        self.seen.append((float(t.detach().min()), float(t.detach().max())))
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def sample(path, count=16):
    generator = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, count, 2, dtype=torch.float64, generator=generator)
    return path.sample(x0, x1, torch.rand(count, dtype=torch.float64, generator=generator) * 0.99)


@pytest.mark.parametrize("path", [OptimalTransport(), VarianceExploding(sigma_max=2.0)], ids=["ot", "ve"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_loss_is_minus_the_log_density_a_dimension(path, divergence):
    objective, network, batch = MaximumLikelihood(path, divergence=divergence, **TIGHT), Small(), sample(path)
    probe = Exact() if divergence == "exact" else Hutchinson(torch.sign(batch.x0)[None])
    expected = log_density(
        objective.velocity(network), batch.x1, objective.interval, Solver(**TIGHT), probe, path.source_std
    )
    loss = objective.loss(network, batch)
    torch.testing.assert_close(loss, -expected.log_density / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", [TIGHT, {"method": "rk4", "steps": 20}], ids=["dopri5", "rk4"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_adjoint_gives_the_gradient(settings, divergence):
    path, network = OptimalTransport(), Small()
    objective, batch = MaximumLikelihood(path, divergence=divergence, **settings), sample(OptimalTransport())
    objective.loss(network, batch).mean().backward()
    step = 1e-5
    for parameter in network.parameters():
        direction = torch.randn(
            parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        slope = float((parameter.grad * direction).sum())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                values.append(float(objective.loss(network, batch).mean()))
                parameter -= sign * step * direction
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    low, high = (min(low for low, _ in network.seen), max(high for _, high in network.seen))
    assert low >= 0
    assert high <= 1


def test_forward_and_adjoint_stop_exactly_at_their_ends():
    network, path = Small(), OptimalTransport()
    MaximumLikelihood(path, **TIGHT).loss(network, sample(path)).mean().backward()
    times = [low for low, _ in network.seen]
    # Each solve starts at one end and stops just before the other; a step beyond it would be clamped to it.
    assert (times.count(0.0), times.count(1.0)) == (1, 1)


def test_training_raises_the_likelihood():
    path, network = OptimalTransport(), Small()
    objective = MaximumLikelihood(path, method="rk4", steps=6, divergence="exact")
    optimizer, batch = torch.optim.Adam(network.parameters(), lr=0.02), sample(path, 64)
    batch = path.sample(batch.x0, 0.2 * batch.x1 + 1, batch.t)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective.loss(network, batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_cnf_refuses_what_it_cannot_do():
    path = OptimalTransport()
    with pytest.raises(UserError, match="differentiated"):
        MaximumLikelihood(path, method="scipy_solver")
    with pytest.raises(UserError, match="hutchinson or exact"):
        MaximumLikelihood(path, divergence="none")
    with pytest.raises(UserError, match="needs steps"):
        MaximumLikelihood(path, method="rk4")
    with pytest.raises(TypeError, match="Module"):
        MaximumLikelihood(path).loss(lambda t, x, label: x, sample(path))


def labeled_network(t, x, label):
    return x * t[:, None] + (0.0 if label is None else label[:, None].to(x.dtype))


def test_guidance_moves_away_from_the_unconditional_velocity_and_costs_two_forwards():
    objective, x, label = FlowMatching(OptimalTransport()), torch.randn(3, 2), torch.tensor([1, 2, 3])
    t = torch.tensor(0.5)
    plain = objective.velocity(labeled_network, label)(t, x)
    without = objective.velocity(labeled_network)(t, x)
    for scale in (0.0, 1.0, 1.5, 4.0):
        velocity = guided_velocity(objective, labeled_network, label, scale)
        torch.testing.assert_close(velocity(t, x), without + scale * (plain - without))
        solution = solve(velocity, x, objective.interval, Solver("midpoint", steps=5))
        assert solution.nfe == (10 if scale == 1 else 20)
    with pytest.raises(UserError, match="guidance scale"):
        guided_velocity(objective, labeled_network, label, -1.0)


def test_a_null_label_stands_for_none():
    objective, x = FlowMatching(OptimalTransport()), torch.randn(3, 2)
    label, null = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64)
    by_none = guided_velocity(objective, labeled_network, label, 2.0)(torch.tensor(0.5), x)
    by_null = guided_velocity(objective, labeled_network, label, 2.0, null)(torch.tensor(0.5), x)
    torch.testing.assert_close(by_none, by_null)


def test_likelihood_counts_guided_forwards_too():
    objective, x = FlowMatching(OptimalTransport()), torch.randn(3, 2)
    velocity = guided_velocity(objective, labeled_network, torch.tensor([1, 2, 3]), 2.0)
    actual = log_density(velocity, x, objective.interval, Solver("euler", steps=4), Exact())
    assert actual.nfe == 8


@pytest.mark.parametrize("cls", [ScoreMatching, NoisePrediction])
def test_guiding_the_velocity_is_guiding_the_prediction(cls):
    objective, scale = cls(VariancePreserving()), 3.0
    x, label, t = torch.randn(3, 2), torch.tensor([1, 2, 3]), torch.tensor(0.7)

    def guided(t, x, label):
        without = labeled_network(t, x, None)
        return without + scale * (labeled_network(t, x, label) - without)

    expected = objective.velocity(guided, label)(t, x)
    actual = guided_velocity(objective, labeled_network, label, scale)(t, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_coupling_that_ties_the_probe_to_the_data_is_refused():
    """The probe is the signs of x0; under optimal transport x0 depends on x1, and therefore the probe too."""
    keys = {"objective": "maximum-likelihood", "coupling": "minibatch-optimal-transport"}
    with pytest.raises(UserError, match=r"maximum-likelihood cannot be used with .*; use independent"):
        build_method(MethodSection(**keys))
    build_method(MethodSection(objective="maximum-likelihood"))
    build_method(MethodSection(coupling="minibatch-optimal-transport"))
