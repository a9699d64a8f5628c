"""The variance-preserving path with DDPM's discrete steps, against their definition."""

import math

import numpy as np
import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.affine import derivative
from fm_core.method.objectives import NoisePrediction
from fm_core.method.ode import Solver, solve
from fm_core.method.paths import VariancePreserving

DDPM = VariancePreserving(steps=1000)
ALPHA_SQUARED = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
"""DDPM (Ho et al. 2020): the products of 1 - beta_j."""
TIMES = 1 - np.arange(1, 1001) / 1000
"""t of each step."""


def test_the_marginals_at_every_step_are_those_of_ddpm():
    t = torch.tensor(TIMES)
    np.testing.assert_allclose(DDPM.alpha(t).numpy() ** 2, ALPHA_SQUARED, rtol=1e-9)
    np.testing.assert_allclose(DDPM.sigma(t).numpy() ** 2, 1 - ALPHA_SQUARED, rtol=1e-8)
    # The continuous path is close, and not the same.
    difference = VariancePreserving().alpha(t).numpy() ** 2 / ALPHA_SQUARED - 1
    assert 0.01 < np.abs(difference).max() < 0.1


def test_float32_is_as_exact_as_it_can_be():
    t = torch.tensor(TIMES, dtype=torch.float32)
    exact = DDPM.sigma(t.double())
    assert (DDPM.sigma(t) / exact - 1).abs().max() < 1e-5


def test_it_is_a_smooth_path():
    t = torch.linspace(*DDPM.interval, 33, dtype=torch.float64)
    assert DDPM.interval == (0.0, 0.999)
    torch.testing.assert_close(DDPM.d_alpha(t), derivative(DDPM.alpha, t))
    torch.testing.assert_close(DDPM.d_sigma(t), derivative(DDPM.sigma, t))
    torch.testing.assert_close(DDPM.alpha(t) ** 2 + DDPM.sigma(t) ** 2, torch.ones_like(t))
    assert (DDPM.alpha(t).diff() > 0).all()
    assert float(DDPM.integrated_beta(torch.tensor(1.0))) == 0


def test_a_gaussian_is_transported_to_the_marginal_of_ddpms_first_step():
    """The network is what DiT or ADM would learn for data N(0, v); deviations are by DDPM's definition."""
    variance = 0.25
    squared = torch.tensor(ALPHA_SQUARED)

    def network(t, x, label):
        alpha2 = DDPM.alpha(t) ** 2
        return x * ((1 - alpha2).sqrt() / (alpha2 * variance + 1 - alpha2))[:, None]

    x = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)
    objective = NoisePrediction(DDPM)
    end = solve(objective.velocity(network), x, objective.interval, Solver("dopri8", 1e-9, 1e-9)).x
    deviation = [math.sqrt(float(squared[i]) * variance + 1 - float(squared[i])) for i in (0, 999)]
    torch.testing.assert_close(end, x * deviation[0] / deviation[1], rtol=1e-6, atol=1e-8)


def test_betas_that_are_no_probabilities_are_refused():
    with pytest.raises(UserError, match="steps 100 must be 0 or more than 10 beta_max = 200; DDPM has 1000"):
        VariancePreserving(steps=100)


def test_the_end_of_the_interval_is_set_once():
    with pytest.raises(UserError, match="epsilon does nothing with steps 1000"):
        VariancePreserving(steps=1000, epsilon=0.01)
    assert VariancePreserving(epsilon=0.01).interval == (0.0, 0.99)
