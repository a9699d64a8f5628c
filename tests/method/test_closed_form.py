"""Every supported (objective, path) pair against Gaussian data with known marginals, in float64."""

import numpy as np
import pytest
import torch

from fm_core.method.ode import Solver, solve
from fm_core.method.paths import PathSample
from fm_core.method.registry import supported_pairs
from tests.support.gaussian_mixtures import PAIRS, PATHS, REGRESSIONS, gaussian, line, plane, pushforward

TIGHT = Solver("dopri8", rtol=1e-8, atol=1e-8)


def test_the_pairs_proved_here_are_all_that_are_supported():
    pairs = supported_pairs()
    supported = {pair for pair, interval in pairs.items() if not isinstance(interval, str)}
    proved = {(objective, path) for objective, path in PAIRS if path != "affine"}
    assert proved == {(objective, path) for objective, path in supported if objective in REGRESSIONS}
    # The others are tested in test_cnf_and_guidance.py and test_flow_maps.py; a new one needs a test as well.
    others = {"maximum-likelihood", "meanflow", "split-meanflow"}
    assert {objective for objective, _ in pairs} == {*REGRESSIONS, *others}


pairs = pytest.mark.parametrize(("objective", "path"), PAIRS, ids=lambda name: name)
paths = pytest.mark.parametrize("path", PATHS)


def inside(interval, count=7):
    """Times from one end of the interval to the other."""
    return torch.linspace(*interval, count, dtype=torch.float64)


@paths
def test_the_reference_velocity_obeys_the_continuity_equation(path):
    # In one dimension u = -(d/dt F_t) / p_t, where F_t is the distribution function; this formula contains
    # no conditional mean.
    mixture = line(PATHS[path])
    start, end = PATHS[path].interval
    t = torch.linspace(start + 0.02, end - 0.02, 41, dtype=torch.float64).requires_grad_()
    x = torch.linspace(-1.2, 1.2, 41, dtype=torch.float64)[:, None] * PATHS[path].sigma(t.detach())[
        :, None
    ].clamp(min=1)
    (d_distribution,) = torch.autograd.grad(mixture.distribution(t, x).sum(), t)
    expected = -d_distribution / mixture.log_density(t, x).exp()
    torch.testing.assert_close(mixture.velocity(t, x)[:, 0], expected.detach(), rtol=1e-7, atol=1e-7)


@pairs
@pytest.mark.parametrize("data", [line, gaussian], ids=["mixture", "gaussian"])
def test_the_optimum_of_the_loss_is_the_marginal_velocity(objective, path, data):
    mixture, pair = data(PATHS[path]), REGRESSIONS[objective](PATHS[path])
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(3)  # exact: the loss is quadratic in x1
    nodes, node_weights = torch.tensor(nodes), torch.tensor(node_weights / node_weights.sum())
    for t in inside(pair.interval):
        if float(PATHS[path].sigma(t)) < 1e-9:
            continue  # x0 is not a function of x_t
        t = t[None]
        scale = mixture.means.shape[1]
        x = torch.linspace(-0.7, 0.9, scale, dtype=torch.float64)[None] * float(
            PATHS[path].sigma(t).clamp(min=1)
        )
        weights, means, variances = mixture.posteriors(t, x)
        x1 = means[0, :, None] + variances[0, :, None].sqrt() * nodes[None, :, None]  # [K, 3, D]
        weight = (weights[0, :, None] * node_weights).flatten()
        x1 = x1.flatten(0, 1)
        times = t.expand(len(x1))
        x0 = (x - PATHS[path].alpha(t) * x1) / PATHS[path].sigma(t)
        sample = PATHS[path].sample(x0, x1, times)
        torch.testing.assert_close(sample.x_t, x.expand_as(sample.x_t))

        def expected_gradient(prediction, sample=sample, weight=weight):
            prediction = prediction.clone().requires_grad_()
            losses = pair.loss(lambda t, x_t, label: prediction.expand_as(x_t), sample)
            return torch.autograd.grad((weight * losses).sum(), prediction)[0]

        at_zero, at_one = expected_gradient(torch.zeros_like(x)), expected_gradient(torch.ones_like(x))
        optimum = at_zero / (at_zero - at_one)  # where the gradient of a quadratic vanishes
        velocity = pair.velocity_from(optimum, t, x)
        torch.testing.assert_close(velocity, mixture.velocity(t, x), rtol=1e-6, atol=1e-6)


@pairs
def test_the_velocity_of_an_exact_prediction_is_the_marginal_velocity(objective, path):
    mixture, pair = plane(PATHS[path]), REGRESSIONS[objective](PATHS[path])
    velocity = pair.velocity(mixture.prediction(objective))
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for t in inside(pair.interval):
        torch.testing.assert_close(velocity(t, x), mixture.velocity(t, x), rtol=1e-7, atol=1e-7)


@pairs
def test_gaussian_samples_have_the_mean_and_covariance_of_the_pushforward(objective, path):
    pair = REGRESSIONS[objective](PATHS[path])
    mixture = gaussian(PATHS[path])
    velocity = pair.velocity(mixture.prediction(objective))
    # The flow of a Gaussian is affine, so four points determine mean and covariance without sampling error.
    points = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    flowed = solve(velocity, points, pair.interval, TIGHT).x
    mean, columns = flowed[0], flowed[1:] - flowed[0]
    expected_mean, expected_std = pushforward(mixture, pair.interval)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(columns, torch.diag(expected_std), rtol=1e-5, atol=1e-6)


def test_a_wrong_sign_of_the_score_is_detected():
    """Eqs. 43 and 46 of the paper hold for minus the score; confusing the two signs causes a large error."""
    path = PATHS["variance-preserving"]
    mixture, pair = plane(path), REGRESSIONS["score-matching"](path)
    t, x = torch.tensor(0.9, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    wrong = pair.velocity(lambda t, x, label: -mixture.score(t, x))(t, x)
    assert (wrong - mixture.velocity(t, x)).abs().max() > 0.5


def test_loss_is_per_example_and_per_dimension():
    path = PATHS["optimal-transport"]
    pair = REGRESSIONS["flow-matching"](path)
    x1 = torch.ones(2, 3, 4, 4)
    velocity = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 2.0)])
    sample = PathSample(x_t=x1, velocity=velocity, x0=x1, x1=x1, t=torch.tensor([0.1, 0.2]))
    loss = pair.loss(lambda t, x, label: torch.ones_like(x), sample)
    torch.testing.assert_close(loss, torch.ones(2))


def test_losses_have_the_weights_of_the_paper():
    path = PATHS["variance-preserving"]
    x0, x1, s = torch.randn(3, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    t = torch.linspace(*path.interval, 20, dtype=torch.float64)
    sample, sigma, beta = path.sample(x0, x1, t), path.sigma(t), 0.1 + 19.9 * (1 - t)

    def loss(objective, prediction):
        return REGRESSIONS[objective](path).loss(lambda t, x, label: prediction, sample)

    score_error = (s + x0 / sigma[:, None]).square().mean(1)  # the conditional score is -x0 / sigma
    torch.testing.assert_close(loss("score-matching", s), sigma**2 * score_error)
    torch.testing.assert_close(loss("scoreflow", s), beta * score_error)
    noise_error = (s - x0).square().mean(1)
    torch.testing.assert_close(loss("noise-prediction", s), noise_error)
    torch.testing.assert_close(loss("data-prediction", s), (s - x1).square().mean(1))
    # Flow matching on the velocity of a noise prediction has the weight (beta / 2 sigma)^2, 50^2 at the end.
    velocity = REGRESSIONS["noise-prediction"](path).velocity_from(s, t, sample.x_t)
    torch.testing.assert_close(loss("flow-matching", velocity), (beta / (2 * sigma)) ** 2 * noise_error)
