"""Guidance compared with closed forms, in which classes are the components of a Gaussian mixture."""

import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.divergence import Exact
from fm_core.method.guidance import GuidedVelocity, autoguided_velocity, guided_velocity
from fm_core.method.likelihood import log_density
from fm_core.method.objectives import FlowMatching
from fm_core.method.ode import Solver, solve
from fm_core.method.paths import OptimalTransport
from fm_core.method.time_grid import TimeGrid
from tests.support.gaussian_mixtures import PAIRS, PATHS, REGRESSIONS, Mixture, line

pairs = pytest.mark.parametrize(("objective", "path"), PAIRS)
LABELS = torch.tensor([0, 1, 1, 0, 1])


class ClassNetwork:
    """The exact network of an objective on a mixture whose components are classes; counts its calls."""

    def __init__(self, mixture, objective="flow-matching"):
        self.calls = 0
        self._all = mixture.prediction(objective)
        self._classes = [
            Mixture(torch.ones_like(weight)[None], mean[None], variance[None], mixture.path)
            .prediction(objective)
            for weight, mean, variance in zip(mixture.weights, mixture.means, mixture.variances, strict=True)
        ]  # fmt: skip

    def __call__(self, t, x, label):
        self.calls += 1
        if label is None:
            return self._all(t, x, None)
        each = torch.stack([network(t, x, None) for network in self._classes])
        return each[label, torch.arange(len(x))]


def weak(path):
    """A weaker model of the same classes: broader and slightly shifted."""
    good = line(path)
    return Mixture(good.weights, 0.9 * good.means + 0.05, good.variances + 0.1, path)


def points(count=5, dtype=torch.float64):
    return torch.linspace(-1.2, 1.1, count, dtype=dtype)[:, None]


def velocities(path, mixture):
    """Time 0.4, the points, and there the velocity of each class and the velocity of the mixture."""
    t, x = torch.tensor(0.4, dtype=torch.float64), points()
    network = ClassNetwork(mixture)
    times = t.expand(len(x))
    return t, x, network(times, x, LABELS), network(times, x, None)


@pairs
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_classifier_free_guidance_extrapolates_from_the_velocity_of_the_mixture(objective, path, scale):
    along = PATHS[path]
    t, x, of_class, of_all = velocities(along, line(along))
    built = REGRESSIONS[objective](along)
    guided = guided_velocity(built, ClassNetwork(line(along), objective), LABELS, scale)
    torch.testing.assert_close(guided(t, x), of_all + scale * (of_class - of_all))


@pairs
def test_autoguidance_extrapolates_from_the_velocity_of_the_weaker_model(objective, path):
    """The weaker model gets the same labels, and may have been trained with another objective."""
    along = PATHS[path]
    t, x, of_class, _ = velocities(along, line(along))
    *_, of_weak, _ = velocities(along, weak(along))
    conditional = REGRESSIONS[objective](along).velocity(ClassNetwork(line(along), objective), LABELS)
    for other in (objective, "flow-matching"):
        weaker = REGRESSIONS[other](along).velocity(ClassNetwork(weak(along), other), LABELS)
        guided = autoguided_velocity(conditional, weaker, 2.5)
        torch.testing.assert_close(guided(t, x), of_weak + 2.5 * (of_class - of_weak))


def parts(interval=None, scale=2.0, dtype=torch.float32):
    """A network, its conditional velocity and its guided velocity."""
    path = OptimalTransport()
    objective, network = FlowMatching(path), ClassNetwork(line(path))
    network_32 = lambda t, x, label: network(t.double(), x.double(), label).to(dtype)  # noqa: E731
    plain = objective.velocity(network_32, LABELS)
    return network, plain, guided_velocity(objective, network_32, LABELS, scale, interval=interval)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_belong_to_the_interval_and_no_time_beyond_them(dtype):
    network, plain, guided = parts((0.3, 0.7), dtype=dtype)
    _, _, everywhere = parts(dtype=dtype)
    x = points(dtype=dtype)
    low, high = torch.tensor([0.3, 0.7], dtype=dtype)
    for t, inside in (
        (low, True),
        (high, True),
        (torch.nextafter(low, high), True),
        (torch.nextafter(low, low * 0), False),
        (torch.nextafter(high, high + 1), False),
    ):
        network.calls = 0
        assert torch.equal(guided(t, x), (everywhere if inside else plain)(t, x))
        assert guided.evaluations_at(t, dtype) == ((2, 0) if inside else (1, 0))
        assert torch.equal(guided(t.double(), x), guided(t, x))
        assert network.calls == 3 * (2 if inside else 1) + (not inside)  # `plain` shares the network


def test_each_image_of_a_batch_may_have_a_time_of_its_own():
    _, plain, guided = parts((0.3, 0.7))
    _, _, everywhere = parts()
    t, x = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), points(dtype=torch.float32)
    inside = torch.tensor([False, True, True, True, False])[:, None]
    assert torch.equal(guided(t, x), torch.where(inside, everywhere(t, x), plain(t, x)))


SOLVERS = [
    Solver("euler", steps=10),
    Solver("midpoint", steps=7),
    Solver("heun2", steps=5, grid=TimeGrid("shift", shift=2.0)),
    Solver("dpmpp_2m", steps=6),
    Solver("dopri5", rtol=1e-4, atol=1e-4),
    Solver("bosh3", rtol=1e-3, atol=1e-3),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.method)
@pytest.mark.parametrize("interval", [None, (0.3, 0.6), (0.0, 1.0)], ids=str)
def test_every_evaluation_of_the_network_is_counted_once(solver, interval):
    network, _, guided = parts(interval)
    solution = solve(guided, points(dtype=torch.float32), (0.0, 1.0), solver, path=OptimalTransport())
    assert solution.nfe == network.calls
    assert solution.guide_nfe == 0


def test_euler_guides_the_steps_that_begin_in_the_interval():
    for interval, guided_steps in (((0.3, 0.6), 4), ((0.31, 0.59), 2), ((0.0, 0.0999), 1), ((0.0, 1.0), 10)):
        solution = solve(parts(interval)[2], points(dtype=torch.float32), (0.0, 1.0), SOLVERS[0])
        assert solution.nfe == 10 + guided_steps


@pytest.mark.parametrize("interval", [(0.3, 0.6), (0.0, 0.5), (0.5, 1.0)], ids=str)
def test_an_adaptive_solver_stops_at_the_ends_of_the_interval(interval):
    """The solve is as accurate as three consecutive solves of velocities without a jump."""
    solver = Solver("dopri5", rtol=1e-7, atol=1e-7)
    _, plain, guided = parts(interval, dtype=torch.float64)
    _, _, everywhere = parts(dtype=torch.float64)
    x, rejected = points(), 0
    once = solve(guided, x, (0.0, 1.0), solver)
    for span, velocity in (
        ((0.0, interval[0]), plain),
        (interval, everywhere),
        ((interval[1], 1.0), plain),
    ):
        if span[0] < span[1]:
            part = solve(velocity, x, span, solver)
            x, rejected = part.x, rejected + part.rejected
    torch.testing.assert_close(once.x, x, rtol=0, atol=1e-5)
    assert once.rejected <= rejected + 5


def test_a_likelihood_counts_the_evaluations_of_an_interval_too():
    network, _, guided = parts((0.3, 0.6))
    actual = log_density(guided, points(dtype=torch.float32), (0.0, 1.0), SOLVERS[0], Exact())
    assert actual.nfe == network.calls == 14


def test_evaluations_of_the_weaker_network_are_counted_apart():
    strong, plain, _ = parts()
    path = OptimalTransport()
    other = ClassNetwork(weak(path))
    weaker = FlowMatching(path).velocity(
        lambda t, x, label: other(t.double(), x.double(), label).float(), LABELS
    )
    guided = autoguided_velocity(plain, weaker, 2.0, (0.25, 0.75))
    solution = solve(guided, points(dtype=torch.float32), (0.0, 1.0), Solver("midpoint", steps=8))
    assert (solution.nfe, solution.guide_nfe) == (strong.calls + other.calls, other.calls)
    assert 0 < other.calls < strong.calls == 16


def test_scale_1_is_no_guidance_to_the_bit():
    network, plain, guided = parts((0.3, 0.6), scale=1.0)
    x, solver = points(dtype=torch.float32), Solver("heun2", steps=6)
    expected = solve(plain, x, (0.0, 1.0), solver)
    network.calls = 0
    for velocity in (guided, autoguided_velocity(plain, plain, 1.0)):
        actual = solve(velocity, x, (0.0, 1.0), solver)
        assert torch.equal(actual.x, expected.x)
        assert actual.nfe == expected.nfe == 12
    assert network.calls == 24


def test_impossible_guidance_is_refused():
    _, plain, _ = parts()
    with pytest.raises(UserError, match="scale must be at least 0"):
        autoguided_velocity(plain, plain, -1.0)
    with pytest.raises(UserError, match="interval must increase"):
        GuidedVelocity(plain, plain, 2.0, (0.6, 0.6))
