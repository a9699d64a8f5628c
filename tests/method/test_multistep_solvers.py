"""Multistep solvers: order, number of evaluations, and behavior at the ends of a path."""

import math
from itertools import pairwise

import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.affine import Affine
from fm_core.method.denoiser import Denoiser
from fm_core.method.guidance import GuidedVelocity
from fm_core.method.multistep_solvers import Multistep
from fm_core.method.objectives import FlowMatching
from fm_core.method.ode import Solver, solve
from fm_core.method.solver import MULTISTEP
from fm_core.method.time_grid import TimeGrid
from tests.support.gaussian_mixtures import PATHS, REGRESSIONS, plane, two_components

LOG_SNR = TimeGrid("log-snr")
EXACT = Solver("dopri8", rtol=1e-10, atol=1e-10)
COMPLETE = {
    **{"ddim": (1, 20), "dpmpp_2m": (2, 20), "dpmpp_3m": (2, 80), "exp_ab3": (2, 80), "unipc": (2, 200)},
    "ab2": (2, 20),
}
"""Order of the complete scheme, and a number of steps that is large enough to measure it."""
NOMINAL = {"ddim": 1, "dpmpp_2m": 2, "dpmpp_3m": 2, "exp_ab3": 3, "unipc": 3, "ab2": 2}


def noise(path, count=8):
    generator = torch.Generator().manual_seed(3)
    return path.source_std * torch.randn(count, 2, dtype=torch.float64, generator=generator)


def error(x, exact):
    return float((x - exact).square().mean().sqrt())


def slope(errors):
    return math.log2(errors[0] / errors[1])


@pytest.fixture(scope="module")
def problem():
    """Two components on a path with log-SNR from -4.7 to 6, and the exact samples from fixed noise."""
    path = PATHS["affine"]
    velocity = two_components(path)
    return path, velocity, solve(velocity, noise(path), path.interval, EXACT).x


@pytest.mark.parametrize("method", MULTISTEP)
def test_the_complete_scheme_converges_with_its_order(problem, method):
    path, velocity, exact = problem
    order, steps = COMPLETE[method]
    grid = TimeGrid() if method == "ab2" else LOG_SNR
    solvers = [Solver(method, steps=count, grid=grid) for count in (steps, 2 * steps)]
    errors = [
        error(solve(velocity, noise(path), path.interval, solver, path=path).x, exact) for solver in solvers
    ]
    assert slope(errors) == pytest.approx(order, abs=0.2)


@pytest.fixture(scope="module")
def inner():
    """The same problem away from both ends, with exact states at two earlier times for each step count."""
    path, interval = PATHS["optimal-transport"], (0.3, 0.8)
    velocity = two_components(path)
    start = solve(velocity, noise(path), (0.0, interval[0]), EXACT).x
    before = {}
    for steps in (64, 128):
        times = LOG_SNR.on(interval, steps, path).times
        earlier = [interval[0] - k * (times[1] - times[0]) for k in (2, 1)]
        states = [solve(velocity, start, (interval[0], t), EXACT).x for t in earlier]
        before[steps] = times, list(zip(earlier, states, strict=True))
    return path, velocity, start, before, solve(velocity, start, interval, EXACT).x


@pytest.mark.parametrize("method", MULTISTEP)
def test_from_exact_values_it_converges_with_its_nominal_order(inner, method):
    path, velocity, x0, before, exact = inner
    errors = []
    for times, states in before.values():
        solver, x = Multistep(method, Denoiser(velocity, path)), x0
        for t, state in states:
            solver.add_exact(t, state)
        for t, to in pairwise(times):
            x = solver.step(t, to, x)
        errors.append(error(x, exact))
    assert slope(errors) == pytest.approx(NOMINAL[method], abs=0.2)


@pytest.mark.parametrize("method", MULTISTEP)
@pytest.mark.parametrize("name", ["optimal-transport", "variance-preserving", "variance-exploding", "cosine"])
def test_one_evaluation_per_step_inside_the_interval_is_accurate_on_every_path(name, method):
    path = PATHS[name]
    times = []

    def velocity(t, x):
        times.append(float(t))
        return two_components(path)(t, x)

    exact = solve(two_components(path), noise(path, 4), path.interval, Solver(rtol=1e-6, atol=1e-6)).x
    for grid in (TimeGrid(), LOG_SNR):
        times.clear()
        solver = Solver(method, steps=40, grid=grid)
        solution = solve(velocity, noise(path, 4), path.interval, solver, path=path)
        assert solution.nfe == len(times) == solution.accepted == 40
        assert path.interval[0] == times[0]
        assert max(times) < path.interval[1]
        assert error(solution.x, exact) < 0.05


def test_ddim_is_eulers_method_on_the_path_of_optimal_transport():
    path = PATHS["optimal-transport"]
    arguments = plane(path).velocity, noise(path), path.interval
    ddim = solve(*arguments, Solver("ddim", steps=7), path=path)
    torch.testing.assert_close(ddim.x, solve(*arguments, Solver("euler", steps=7)).x)


@pytest.mark.parametrize("objective", ["score-matching", "noise-prediction", "data-prediction"])
def test_every_objective_gives_the_same_samples(objective):
    """x1 and x0 are computed from the velocity, for every type of prediction."""
    path = PATHS["affine"]
    mixture, solver = plane(path), Solver("dpmpp_3m", steps=6)
    pair = REGRESSIONS[objective](path)
    x = solve(pair.velocity(mixture.prediction(objective)), noise(path), pair.interval, solver, path=path).x
    expected = solve(mixture.velocity, noise(path), path.interval, solver, path=path).x
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_guidance_counts_both_networks():
    path = PATHS["optimal-transport"]
    guided = GuidedVelocity(plane(path).velocity, plane(path).velocity, 2.0)
    solver = Solver("unipc", steps=5)
    solution = solve(guided, noise(path), path.interval, solver, path=path)
    assert solution.nfe == 10
    torch.testing.assert_close(
        solution.x, solve(plane(path).velocity, noise(path), path.interval, solver, path=path).x
    )


def test_a_trajectory_passes_through_the_steps_and_costs_nothing():
    path = PATHS["optimal-transport"]
    arguments = plane(path).velocity, noise(path), path.interval
    solver = Solver("dpmpp_2m", steps=4)
    solution = solve(*arguments, solver, at=[0.0, 0.125, 0.25, 1.0], path=path)
    assert solution.nfe == 4
    first = solve(*arguments[:2], (0.0, 0.25), Solver("ddim", steps=1), path=path).x
    torch.testing.assert_close(solution.trajectory[0], noise(path))
    torch.testing.assert_close(solution.trajectory[2], first)
    torch.testing.assert_close(solution.trajectory[1], (noise(path) + first) / 2)
    torch.testing.assert_close(solution.trajectory[3], solution.x)
    with pytest.raises(ValueError, match="trajectory times"):
        solve(*arguments, solver, at=[0.5, 0.2], path=path)


def test_what_cannot_be_solved_is_refused():
    path = PATHS["optimal-transport"]
    arguments = plane(path).velocity, noise(path)
    with pytest.raises(ValueError, match="solves from noise to data only"):
        solve(*arguments, (1.0, 0.0), Solver("ddim", steps=4), path=path)
    with pytest.raises(ValueError, match="needs the path"):
        solve(*arguments, (0.0, 1.0), Solver("ddim", steps=4))
    late = Affine(lambda t: t**2, lambda t: 1 - t**2)
    with pytest.raises(UserError, match="log-SNR of the path Affine does not increase at t = 0"):
        solve(
            FlowMatching(late).velocity(plane(late).prediction("flow-matching")),
            noise(late),
            (0.0, 1.0),
            Solver("ddim", steps=4),
            path=late,
        )


def test_states_are_float32_or_better_and_without_gradients():
    weight = torch.ones((), requires_grad=True)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    solution = solve(lambda t, x: weight * x, x, (0.0, 1.0), Solver("unipc", steps=4), path=PATHS["cosine"])
    assert solution.x.dtype == torch.float32
    assert not solution.x.requires_grad
    with pytest.raises(ArithmeticError, match="not finite"):
        solve(lambda t, x: x * math.nan, x, (0.0, 1.0), Solver("ab2", steps=2), path=PATHS["cosine"])
