"""Every supported (objective, path) pair against Gaussian data with known marginals, in float64."""

import math

import numpy as np
import pytest
import torch

from fm_core.method.divergence import Exact, Hutchinson
from fm_core.method.likelihood import log_density
from fm_core.method.ode import Solver, solve
from fm_core.method.paths import PathSample
from fm_core.method.registry import supported_pairs
from tests.support.gaussian_mixtures import PAIRS, PATHS, REGRESSIONS, gaussian, line, plane

TIGHT = Solver("dopri8", rtol=1e-8, atol=1e-8)


def test_the_pairs_proved_here_are_all_that_are_supported():
    pairs = supported_pairs()
    supported = {pair for pair, interval in pairs.items() if not isinstance(interval, str)}
    proved = {(objective, path) for objective, path in PAIRS if path != "affine"}
    assert proved == {(objective, path) for objective, path in supported if objective in REGRESSIONS}
    # The last one is proved in test_cnf_and_guidance.py; a new one must be proved somewhere.
    assert {objective for objective, _ in pairs} == {*REGRESSIONS, "maximum-likelihood"}


pairs = pytest.mark.parametrize(("objective", "path"), PAIRS, ids=lambda name: name)
paths = pytest.mark.parametrize("path", PATHS)


def source_log_density(x, std):
    """log N(x; 0, std^2 I), [N]."""
    return torch.distributions.Normal(0.0, std).log_prob(x).sum(1)


def inside(interval, count=7):
    """Times from one end of the interval to the other."""
    return torch.linspace(*interval, count, dtype=torch.float64)


@paths
def test_the_reference_velocity_obeys_the_continuity_equation(path):
    # In one dimension u = -(d/dt F_t) / p_t, F_t the distribution function: no conditional mean enters.
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
        optimum = at_zero / (at_zero - at_one)  # where a quadratic's gradient vanishes
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
    # The flow of a Gaussian is affine: four points determine its mean and covariance, without sampling error.
    points = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    flowed = solve(velocity, points, pair.interval, TIGHT).x
    mean, columns = flowed[0], flowed[1:] - flowed[0]
    expected_mean, expected_std = pushforward(mixture, pair.interval)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(columns, torch.diag(expected_std), rtol=1e-5, atol=1e-6)


def pushforward(mixture, interval):
    """Mean and per-unit-of-source deviation, [D], of the flow of Gaussian data with a diagonal covariance."""
    ends = torch.tensor(interval, dtype=torch.float64)
    alpha, sigma = mixture.path.alpha(ends)[:, None], mixture.path.sigma(ends)[:, None]
    std = (alpha**2 * mixture.variances + sigma**2).sqrt()
    ratio = std[1] / std[0]
    return (alpha[1] * mixture.means - ratio * alpha[0] * mixture.means)[0], ratio


def gaussian_density(objective, path):
    pair, mixture = REGRESSIONS[objective](PATHS[path]), gaussian(PATHS[path])
    source_std = PATHS[path].source_std
    mean, ratio = pushforward(mixture, pair.interval)
    x1 = mean + 0.9 * torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual = log_density(
        pair.velocity(mixture.prediction(objective)), x1, pair.interval, TIGHT, Exact(), source_std
    )
    x0 = (x1 - mean) / ratio
    torch.testing.assert_close(actual.source, x0, rtol=1e-5, atol=1e-6)
    expected = source_log_density(x0, source_std) - ratio.log().sum()
    torch.testing.assert_close(actual.log_density, expected, rtol=0, atol=1e-5)


def line_density(objective, path):
    pair, mixture = REGRESSIONS[objective](PATHS[path]), line(PATHS[path])
    source_std = PATHS[path].source_std
    x1 = torch.linspace(-1.2, 1.2, 9, dtype=torch.float64)[:, None]
    actual = log_density(
        pair.velocity(mixture.prediction(objective)), x1, pair.interval, TIGHT, Exact(), source_std
    )
    # On the line the flow keeps quantiles: F_start(x0) = F_end(x1), whence its Jacobian too.
    start, end = (torch.full((9,), t, dtype=torch.float64) for t in pair.interval)
    x0 = quantile(mixture, start, mixture.distribution(end, x1))
    torch.testing.assert_close(actual.source, x0, rtol=1e-5, atol=1e-5)
    change = mixture.log_density(end, x1) - mixture.log_density(start, x0)
    expected = source_log_density(x0, source_std) + change
    torch.testing.assert_close(actual.log_density, expected, rtol=0, atol=1e-5)


def quantile(mixture, t, probability):
    low, high = (
        torch.full((len(t), 1), -500.0, dtype=torch.float64),
        torch.full((len(t), 1), 500.0, dtype=torch.float64),
    )
    for _ in range(80):
        middle = (low + high) / 2
        above = (mixture.distribution(t, middle) > probability)[:, None]
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


def plane_density(objective, path):
    pair, mixture = REGRESSIONS[objective](PATHS[path]), plane(PATHS[path])
    source_std = PATHS[path].source_std
    velocity = pair.velocity(mixture.prediction(objective))
    x1 = 0.8 * torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    actual = log_density(velocity, x1, pair.interval, TIGHT, Exact(), source_std)
    # The exact flow carries p_start to p_end, so its Jacobian is their ratio at corresponding points.
    start, end = (torch.full((6,), t, dtype=torch.float64) for t in pair.interval)
    change = mixture.log_density(end, x1) - mixture.log_density(start, actual.source)
    expected = source_log_density(actual.source, source_std) + change
    torch.testing.assert_close(actual.log_density, expected, rtol=0, atol=1e-5)
    again = solve(velocity, actual.source, pair.interval, TIGHT).x
    torch.testing.assert_close(again, x1, rtol=0, atol=1e-6)


densities = pytest.mark.parametrize("check", [gaussian_density, line_density, plane_density])


@pytest.fixture(params=[pair for pair in PAIRS if pair[0] != "flow-matching"], ids="-".join)
def other_pair(request) -> tuple[str, str]:
    """A pair whose velocity is compared with the marginal one at many times and places above."""
    return request.param


@paths
@densities
def test_the_log_density_on_a_path_is_exact(check, path):
    check("flow-matching", path)


@densities
def test_the_log_density_of_every_other_pair_is_exact(check, other_pair):
    check(*other_pair)


def test_the_mismatch_of_a_path_with_the_data_density_is_small_and_measurable():
    # A property of the diffusion paths: they start from N(0, s^2 I) and not from their own marginal at t = 0.
    mismatch = {}
    for name, path in PATHS.items():
        mixture = plane(path)
        x1 = 0.8 * torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        model = log_density(
            mixture.velocity, x1, path.interval, Solver(rtol=1e-7, atol=1e-7), Exact(), path.source_std
        )
        data = mixture.log_density(torch.full((200,), path.interval[1], dtype=torch.float64), x1)
        mismatch[name] = float((model.log_density - data).abs().mean()) / 2
    assert mismatch["optimal-transport"] < 1e-5  # nats a dimension
    assert mismatch["cosine"] < 1e-5
    assert 1e-4 < mismatch["variance-preserving"] < 1e-2
    assert 1e-4 < mismatch["variance-exploding"] < 3e-2


def correlated(dimension=8):
    """The velocity of a Gaussian with covariance C along OT with sigma_min = 0; its Jacobian is full."""
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(dimension, dimension, dtype=torch.float64, generator=generator) / dimension**0.5
    values, vectors = torch.linalg.eigh(root @ root.T + 0.2 * torch.eye(dimension, dtype=torch.float64))

    def velocity(t, x):
        rate = (t * values - (1 - t)) / (t**2 * values + (1 - t) ** 2)
        return ((x @ vectors) * rate) @ vectors.T

    return velocity, values, vectors


def test_hutchinson_is_unbiased_and_its_error_falls_with_the_root_of_the_probes():
    velocity, values, vectors = correlated()
    generator = torch.Generator().manual_seed(5)
    x1 = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    probes = torch.randint(0, 2, (256, 3, 8), generator=generator).double() * 2 - 1
    actual = log_density(velocity, x1, (0.0, 1.0), Solver(rtol=1e-6, atol=1e-6), Hutchinson(probes))
    exact = -0.5 * (((x1 @ vectors) ** 2 / values).sum(1) + values.log().sum() + 8 * math.log(2 * math.pi))
    error = actual.per_probe - exact[:, None]  # [N, P]
    spread = error.std()
    assert spread > 0.3, "the test needs a Jacobian off the diagonal"
    assert error.mean().abs() < 4 * spread / math.sqrt(3 * 256)
    torch.testing.assert_close(actual.log_density, actual.per_probe.mean(1))
    for count in (4, 16, 64):
        grouped = error.reshape(-1, count).mean(1)
        assert grouped.square().mean().sqrt() == pytest.approx(spread / math.sqrt(count), rel=0.25)


@pytest.mark.parametrize("wrong", ["sign of the velocity", "sign of the divergence", "direction of time"])
def test_a_swapped_sign_or_direction_is_detected(wrong):
    """The closed forms distinguish the right formula from sign errors by far more than their tolerance."""
    mixture = plane(PATHS["optimal-transport"])
    velocity, divergence = mixture.velocity, Exact()
    if wrong == "sign of the velocity":
        velocity = lambda t, x: -mixture.velocity(t, x)  # noqa: E731
    elif wrong == "direction of time":
        velocity = lambda t, x: mixture.velocity(1 - t, x)  # noqa: E731
    else:
        divergence = Negated()
    x1 = 0.5 * torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    actual = log_density(velocity, x1, (0.0, 1.0), Solver(rtol=1e-6, atol=1e-6), divergence)
    expected = mixture.log_density(torch.ones(20, dtype=torch.float64), x1)
    assert (actual.log_density - expected).abs().mean() > 0.3


class Negated(Exact):
    def compute(self, u, x, create_graph):
        return -super().compute(u, x, create_graph)


def test_a_wrong_sign_of_the_score_is_detected():
    """Eqs. 43 and 46 of the paper hold for minus the score; taking one for the other is no small error."""
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
    # Flow matching on the velocity of a noise prediction: weight (beta / 2 sigma)^2, 50^2 at the end.
    velocity = REGRESSIONS["noise-prediction"](path).velocity_from(s, t, sample.x_t)
    torch.testing.assert_close(loss("flow-matching", velocity), (beta / (2 * sigma)) ** 2 * noise_error)
