"""Closed forms of reflow: Gaussian data, whose flow from noise is the optimal-transport map b + S x0."""

import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.cnf_objective import MaximumLikelihood
from fm_core.method.couplings import Reflow
from fm_core.method.objectives import FlowMatching
from fm_core.method.ode import Solver, solve
from fm_core.method.paths import Cosine, OptimalTransport, VarianceExploding, VariancePreserving

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
STD = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
PATH = OptimalTransport(sigma_min=0.0)


def teacher(t, x, label=None):
    """The velocity of flow matching with independent pairs: E[x1 - x0 | x_t]."""
    t = t.view(-1, 1)
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def straightened(t, x, label=None):
    """The velocity of flow matching with the pairs (x0, b + S x0): b + (S - 1) x0 at the x0 of x_t."""
    t = t.view(-1, 1)
    x0 = (x - t * MEAN) / (1 - t + t * STD)
    return MEAN + (STD - 1) * x0


@pytest.fixture(scope="module")
def noise():
    return torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def end(network, noise, steps, method="euler"):
    velocity = FlowMatching(PATH).velocity(network)
    return solve(velocity, noise, (0.0, 1.0), Solver(method, steps=steps), path=PATH).x


def rms(x):
    return x.square().mean(0).sqrt()


def test_the_teacher_maps_noise_by_the_optimal_transport_map(noise):
    assert torch.allclose(end(teacher, noise, 200, "rk4"), MEAN + STD * noise, atol=1e-6)


def test_the_residual_of_its_pairs_vanishes_and_that_of_independent_ones_does_not(noise):
    t = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x1 = MEAN + STD * noise
    straight, objective = PATH.sample(noise, x1, t), FlowMatching(PATH)
    assert objective.loss(straightened, straight).max() < 1e-24
    independent = PATH.sample(noise, x1.roll(1, 0), t)
    # Var[x1 - x0 | x_t] = S^2 / (t^2 S^2 + (1 - t)^2) for each dimension.
    variance = STD**2 / ((t[:, None] * STD) ** 2 + (1 - t[:, None]) ** 2)
    assert objective.loss(teacher, independent).mean() == pytest.approx(float(variance.mean()), rel=0.15)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_euler_steps_of_the_reflowed_field_is_exact(noise, steps):
    assert torch.allclose(end(straightened, noise, steps), MEAN + STD * noise, atol=1e-12)


def test_the_teacher_needs_many_steps(noise):
    errors = {steps: rms(end(teacher, noise, steps) - (MEAN + STD * noise)) for steps in (1, 64, 128)}
    # One step ends at the mean of the data, at distance S |x0|.
    assert torch.allclose(errors[1], STD * rms(noise), rtol=1e-12)
    assert torch.allclose(errors[64] / errors[128], torch.full((3,), 2.0, dtype=torch.float64), rtol=0.15)


def test_the_pairs_of_a_reflowed_field_are_the_same_again(noise):
    """A second round: one step of the first round's field makes the pairs that it was trained on."""
    again = end(straightened, noise, 1)
    sample = PATH.sample(noise, again, torch.full((500,), 0.3, dtype=torch.float64))
    assert FlowMatching(PATH).loss(straightened, sample).max() < 1e-24


def test_pairs_are_not_reordered(noise):
    pairs = Reflow()
    assert pairs.pair(noise, noise + 1, None)[0] is noise
    assert pairs.noise_order(noise, noise + 1) is None


def test_a_path_must_begin_at_noise_alone():
    for path in (OptimalTransport(), Cosine()):
        Reflow().check_path(path)
    for path in (VariancePreserving(), VarianceExploding()):
        with pytest.raises(UserError, match="use optimal-transport"):
            Reflow().check_path(path)


def test_maximum_likelihood_does_not_use_the_noise_of_pairs():
    with pytest.raises(UserError, match="cannot be used with the coupling reflow"):
        MaximumLikelihood(OptimalTransport()).check_coupling(Reflow())
