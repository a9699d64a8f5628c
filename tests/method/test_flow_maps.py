"""Flow maps in closed form, in float64: fixed points of both objectives, derivatives, times, and refusals."""

import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.flow_map import FlowMapVelocity
from fm_core.method.forward_derivative import derivative_along, group_norm
from fm_core.method.meanflow import MeanFlow, SplitMeanFlow
from fm_core.method.objectives import FlowMatching
from fm_core.method.ode import Solver, solve
from fm_core.method.paths import OptimalTransport, PathSample
from fm_core.method.time_pairs import NUMBERS, SecondTimes, draw_time_pairs
from fm_core.method.timestep_samplers import LogitNormal, Uniform
from fm_core.models.mlp import MLP
from tests.support.exact_flow_maps import ExactGaussian, ExactLine
from tests.support.gaussian_mixtures import PATHS, double, gaussian, line

ON_PATHS = ("optimal-transport", "variance-preserving", "cosine", "affine")
OBJECTIVES = {
    "meanflow": lambda path: MeanFlow(path, weight_power=0.0),
    "meanflow, conditional tangent": lambda path: MeanFlow(path, weight_power=0.0, tangent="conditional"),
    "split-meanflow": lambda path: SplitMeanFlow(path, weight_power=0.0),
}
paths = pytest.mark.parametrize("path", ON_PATHS)
objectives = pytest.mark.parametrize("objective", OBJECTIVES)
TIGHT = Solver("dopri8", rtol=1e-10, atol=1e-10)


EXACT = {"gaussian": (gaussian, ExactGaussian), "mixture": (line, ExactLine)}
data = pytest.mark.parametrize("data", EXACT)


def pairs_of_times(path, count=24, shortest=0.02):
    """Times t < s inside the interval of a path, and where to split."""
    generator = torch.Generator().manual_seed(3)
    start, end = path.interval
    u = torch.rand(count, 3, dtype=torch.float64, generator=generator)
    first, last = u[:, :2].sort(1).values.unbind(1)
    # Away from the end, where the velocity of the VP path is steep and float64 loses digits.
    t, s = (start + (end - start) * (0.01 + 0.96 * part) for part in (first, last))
    return t, torch.maximum(s, t + shortest * (end - start)).clamp(max=end), u[:, 2]


def marginal_samples(mixture, t):
    """x_t of the mixture with the marginal velocity as the velocity of the sample."""
    generator = torch.Generator().manual_seed(4)
    shape = (len(t), mixture.means.shape[1])
    x0 = torch.randn(shape, dtype=torch.float64, generator=generator)
    component = torch.multinomial(mixture.weights, len(t), replacement=True, generator=generator)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    x1 = mixture.means[component] + mixture.variances[component].sqrt() * noise
    sample = mixture.path.sample(x0, x1, t)
    return PathSample(sample.x_t, mixture.velocity(t, sample.x_t), x0, x1, t)


def with_times(sample, s, split, apart=None):
    apart = torch.arange(len(s)) if apart is None else apart
    second = SecondTimes(s, split, apart)
    return PathSample(sample.x_t, sample.velocity, sample.x0, sample.x1, sample.t, second)


@paths
@data
def test_the_reference_maps_are_those_of_the_ode(path, data):
    made, exact = EXACT[data]
    mixture = made(PATHS[path])
    network, (start, end) = exact(mixture), PATHS[path].interval
    t, s = start + 0.1 * (end - start), start + 0.8 * (end - start)
    points = marginal_samples(mixture, torch.full((6,), t, dtype=torch.float64)).x_t
    moved = points + FlowMapVelocity(network).displacement(double(t)[0], double(s)[0], points)
    torch.testing.assert_close(moved, solve(mixture.velocity, points, (t, s), TIGHT).x, rtol=1e-7, atol=1e-7)


@paths
@data
@objectives
def test_an_exact_network_has_loss_0(objective, path, data):
    made, exact = EXACT[data]
    mixture, pair = made(PATHS[path]), OBJECTIVES[objective](PATHS[path])
    t, s, split = pairs_of_times(PATHS[path])
    sample = with_times(marginal_samples(mixture, t), s, split)
    loss = pair.loss(exact(mixture), sample)
    scale = sample.velocity.square().mean()
    assert loss.max() < 1e-14 * max(1.0, float(scale))
    # An error of a hundredth of the velocity's scale is seen by all.
    wrong = exact(mixture)
    shifted = pair.loss(lambda t, x, label, s: wrong(t, x, label, s) * (1 + 0.1 * (s - t)[:, None]), sample)
    assert shifted.mean() > 1e-6


@paths
@objectives
def test_the_gradient_of_the_true_map_vanishes_in_expectation_over_data(objective, path):
    # The data are two points, so the expectation over x1 given x_t is a sum. No marginal velocity is given.
    mixture = line(PATHS[path])
    mixture = type(mixture)(
        mixture.weights, mixture.means, torch.full_like(mixture.variances, 1e-12), PATHS[path]
    )
    pair, network = OBJECTIVES[objective](PATHS[path]), ExactLine(mixture)
    t, s, split = pairs_of_times(PATHS[path])
    s = torch.minimum(s, t + 0.3)
    x = marginal_samples(mixture, t).x_t
    weights = mixture.posteriors(t, x)[0]
    for apart, seconds in ((torch.arange(len(t)), s), (torch.arange(0), t)):
        expected, largest = torch.zeros_like(x), 0.0
        for component in range(2):
            x1 = mixture.means[component].expand_as(x)
            x0 = (x - PATHS[path].alpha(t)[:, None] * x1) / PATHS[path].sigma(t)[:, None]
            sample = with_times(PATHS[path].sample(x0, x1, t), seconds, split, apart)
            residual = pair.residual(network, sample)
            expected = expected + weights[:, component, None] * residual
            largest = max(largest, float((weights[:, component, None] * residual).abs().max()))
        if objective == "split-meanflow" and len(apart):
            assert largest < 1e-6  # its target does not depend on the data
        else:
            assert largest > 1e-2
            assert expected.abs().max() < 1e-6 * largest


def test_examples_with_equal_times_have_the_loss_of_flow_matching():
    torch.manual_seed(0)
    path, network = OptimalTransport(), MLP(2, 16, 2, two_times=True)
    torch.nn.init.normal_(network.last.weight)
    x0, x1, t = torch.randn(8, 2), torch.randn(8, 2), torch.rand(8)
    sample = with_times(path.sample(x0, x1, t), t, torch.zeros(8), torch.arange(0))
    expected = FlowMatching(path).loss(network, sample)
    for pair in (MeanFlow(path), SplitMeanFlow(path)):
        torch.testing.assert_close(pair.loss(network, sample), expected, rtol=0, atol=0)


def test_the_weight_multiplies_the_gradient_and_not_the_loss():
    path = OptimalTransport()
    prediction = torch.tensor([[3.0], [0.5]], dtype=torch.float64, requires_grad=True)
    zeros, t = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    sample = PathSample(zeros, zeros, zeros, zeros, t, SecondTimes(t, t, torch.arange(0)))
    for power in (0.0, 1.0, 0.5):
        loss = SplitMeanFlow(path, weight_power=power).loss(lambda t, x, label, s: prediction, sample)
        torch.testing.assert_close(loss.detach(), torch.tensor([9.0, 0.25], dtype=torch.float64))
        (gradient,) = torch.autograd.grad(loss.sum(), prediction)
        square = prediction.detach() ** 2
        torch.testing.assert_close(gradient, 2 * prediction.detach() * (square + 1e-3) ** -power)


@pytest.mark.parametrize("objective", [MeanFlow, SplitMeanFlow])
def test_the_optimum_with_guidance_is_the_guided_velocity(objective):
    path = OptimalTransport()
    with_label, without, t = double(2.0), double(0.5), torch.full((1,), 0.5, dtype=torch.float64)
    pair = objective(path, guidance=3.0, weight_power=0.0)
    guided = 3.0 * with_label - 2.0 * without

    def network(t, x, label, s):
        return (without if label is None else guided).expand_as(x)

    zeros = torch.zeros(1, 1, dtype=torch.float64)
    for s, apart in ((t, torch.arange(0)), (t + 0.3, torch.arange(1))):
        # A constant velocity, whose average over any interval is itself.
        sample = PathSample(zeros, with_label[None], zeros, zeros, t, SecondTimes(s, t, apart))
        assert float(pair.residual(network, sample, torch.zeros(1, dtype=torch.int64)).abs()) < 1e-14
    assert pair.extra_forwards == objective(path).extra_forwards + 1


def test_the_target_has_no_gradient():
    torch.manual_seed(0)
    network, path = MLP(2, 8, 2, two_times=True).double(), OptimalTransport()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x0, x1, t = torch.randn(5, 2).double(), torch.randn(5, 2).double(), torch.rand(5).double() / 2
    sample = with_times(path.sample(x0, x1, t), t + 0.4, torch.rand(5).double())
    for pair in (MeanFlow(path, weight_power=0), SplitMeanFlow(path, weight_power=0)):
        target = network(sample.t, sample.x_t, None, sample.second.s) - pair.residual(network, sample)
        fixed = (network(sample.t, sample.x_t, None, sample.second.s) - target.detach()).square().mean()
        expected = torch.autograd.grad(fixed, tuple(network.parameters()))
        gradients = torch.autograd.grad(pair.loss(network, sample).mean(), tuple(network.parameters()))
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_one_step_of_an_exact_map_is_the_ode_and_counts_one_evaluation():
    mixture = line(OptimalTransport())
    velocity = MeanFlow(OptimalTransport()).velocity(ExactLine(mixture))
    noise = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    exact = solve(mixture.velocity, noise, (0.0, 1.0), TIGHT).x
    for steps in (1, 2, 4):
        solution = solve(velocity, noise, (0.0, 1.0), Solver("flow_map", steps=steps), [0.5, 1.0])
        assert (solution.nfe, solution.accepted) == (steps, steps)
        torch.testing.assert_close(solution.x, exact, rtol=1e-6, atol=1e-6)
        assert solution.trajectory.shape == (2, 7, 1)
    assert (solve(velocity, noise, (0.0, 1.0), Solver("euler", steps=1)).x - exact).abs().max() > 0.1


def test_a_solver_of_flow_maps_needs_a_displacement():
    with pytest.raises(ValueError, match="needs the displacement"):
        solve(lambda t, x: x, torch.zeros(1, 1), (0.0, 1.0), Solver("flow_map", steps=1))
    with pytest.raises(UserError, match="needs steps"):
        Solver("flow_map")
    with pytest.raises(UserError, match="would ignore rtol"):
        Solver("flow_map", steps=1, rtol=1e-3)


def test_times_are_ordered_pairs_in_the_given_fraction():
    u, more = torch.rand(20_000), torch.rand(20_000, NUMBERS)
    for times in (Uniform((0.0, 0.9)), LogitNormal((0.0, 1.0), mean=-0.4)):
        t, second = draw_time_pairs(times, u, more, equal_times=0.75)
        assert (second.s >= t).all()
        assert len(second.apart) == pytest.approx(5_000, abs=300)
        equal = torch.ones(len(t), dtype=torch.bool)
        equal[second.apart] = False
        assert torch.equal(t[equal], times.times(u)[equal])
        assert torch.equal(t[equal], second.s[equal])
        both = torch.cat([t[second.apart], second.s[second.apart]])
        expected = times.times(torch.linspace(0.005, 0.995, 100))
        torch.testing.assert_close(
            both.quantile(torch.linspace(0.005, 0.995, 100)), expected, atol=0.02, rtol=0
        )
    assert len(draw_time_pairs(Uniform(), u, more, 0.0)[1].apart) == 20_000
    assert len(draw_time_pairs(Uniform(), u, more, 1.0)[1].apart) == 0


def test_options_out_of_range_are_refused():
    path = OptimalTransport()
    for options, message in (
        ({"equal_times": 1.5}, "equal_times"),
        ({"weight_power": -1}, "weight_power"),
        ({"guidance": 0.0}, "guidance"),
        ({"tangent": "exact"}, "tangent"),
    ):
        with pytest.raises(UserError, match=message):
            MeanFlow(path, **options)
    with pytest.raises(UserError, match="no common scale"):
        MeanFlow(PATHS["variance-exploding"])
    with pytest.raises(ValueError, match="second time"):
        MeanFlow(path).loss(lambda *_: torch.zeros(1, 1), path.sample(*torch.zeros(2, 1, 1), torch.zeros(1)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_normalization_by_definition_is_that_of_torch(layout):
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64).to(memory_format=layout)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    for parts in ((weight, bias), (None, None)):
        expected = torch.nn.functional.group_norm(x, 2, *parts, eps=1e-3)
        torch.testing.assert_close(group_norm(x, 2, *parts, eps=1e-3), expected)


def test_extra_passes_are_counted():
    path = OptimalTransport()
    assert MeanFlow(path, equal_times=0.75).extra_forwards == 0.75
    assert MeanFlow(path, equal_times=0.75, tangent="conditional").extra_forwards == 0.5
    assert SplitMeanFlow(path, equal_times=0.0).extra_forwards == 2
    assert FlowMatching(path).extra_forwards == 0


def test_the_derivative_is_that_along_the_trajectory():
    mixture = gaussian(OptimalTransport())
    network, t, s = ExactGaussian(mixture), double(0.3, 0.5), double(0.8, 0.9)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = mixture.velocity(t, x)
    step = 1e-6
    difference = (
        network(t + step, x + step * direction, None, s) - network(t - step, x - step * direction, None, s)
    ) / (2 * step)
    torch.testing.assert_close(
        derivative_along(network, t, s, x, direction, None), difference, rtol=1e-7, atol=1e-8
    )
