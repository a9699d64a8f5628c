"""Log densities of every supported (objective, path) pair against data with known marginals, in float64."""

import math

import pytest
import torch

from fm_core.method.divergence import Exact, Hutchinson
from fm_core.method.likelihood import log_density
from fm_core.method.ode import Solver, solve
from tests.support.gaussian_mixtures import PAIRS, PATHS, REGRESSIONS, gaussian, line, plane, pushforward

TIGHT = Solver("dopri8", rtol=1e-8, atol=1e-8)
paths = pytest.mark.parametrize("path", PATHS)


def source_log_density(x, std):
    """log N(x; 0, std^2 I), [N]."""
    return torch.distributions.Normal(0.0, std).log_prob(x).sum(1)


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
    # In one dimension the flow preserves quantiles, F_start(x0) = F_end(x1), which gives its Jacobian too.
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
    # The exact flow transports p_start to p_end, so its Jacobian is their ratio at corresponding points.
    start, end = (torch.full((6,), t, dtype=torch.float64) for t in pair.interval)
    change = mixture.log_density(end, x1) - mixture.log_density(start, actual.source)
    expected = source_log_density(actual.source, source_std) + change
    torch.testing.assert_close(actual.log_density, expected, rtol=0, atol=1e-5)
    again = solve(velocity, actual.source, pair.interval, TIGHT).x
    torch.testing.assert_close(again, x1, rtol=0, atol=1e-6)


densities = pytest.mark.parametrize("check", [gaussian_density, line_density, plane_density])


@pytest.fixture(params=[pair for pair in PAIRS if pair[0] != "flow-matching"], ids="-".join)
def other_pair(request) -> tuple[str, str]:
    """A pair other than flow matching; test_closed_form.py compares its velocity with the exact one."""
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
        x1 = 0.8 * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        model = log_density(mixture.velocity, x1, path.interval, TIGHT, Exact(), path.source_std)
        data = mixture.log_density(torch.full((50,), path.interval[1], dtype=torch.float64), x1)
        mismatch[name] = float((model.log_density - data).abs().mean()) / 2
    assert mismatch["optimal-transport"] < 1e-5  # nats per dimension
    assert mismatch["cosine"] < 1e-5
    assert 1e-4 < mismatch["variance-preserving"] < 1e-2
    assert 1e-4 < mismatch["variance-exploding"] < 3e-2


def correlated(dimension=8):
    """The velocity of a Gaussian with covariance C on the OT path, sigma_min = 0; its Jacobian is full."""
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
    """Sign errors change the closed forms by far more than the tolerance of their tests."""
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
