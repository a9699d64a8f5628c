"""ODE solver: accuracy, number of evaluations, time bounds, and errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_core.errors import UserError
from fm_core.method.ode import ADAPTIVE, FIXED, Solver, integrate, solve

STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


class Recorder:
    """The field dx/dt = -x cos(3 t) times a rate; records the times at which it was evaluated."""

    def __init__(self, rate=1.0):
        self.rate, self.times = rate, []

    def __call__(self, t, x):
        self.times.append(float(t))
        return -self.rate * x * torch.cos(3 * t)

    def exact(self, x, start, end):
        return x * math.exp(-self.rate * (math.sin(3 * end) - math.sin(3 * start)) / 3)


def points(dtype=torch.float64):
    return torch.linspace(0.5, 2, 6, dtype=dtype).reshape(3, 2)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (1.0, 0.0), (0.1, 0.99999), (0.99999, 0.0)])
@pytest.mark.parametrize("method", ADAPTIVE + FIXED)
def test_every_method_solves_in_both_directions_without_leaving_the_interval(method, interval):
    field = Recorder()
    solver = Solver(method) if method in ADAPTIVE else Solver(method, steps=200)
    solution = solve(field, points(), interval, solver)
    tolerance = 1e-2 if method in ("euler", "fehlberg2") else 2e-4
    torch.testing.assert_close(solution.x, field.exact(points(), *interval), rtol=tolerance, atol=tolerance)
    assert solution.nfe == len(field.times)
    assert min(interval) <= min(field.times)
    assert max(field.times) <= max(interval)
    assert solution.times is None
    assert solution.trajectory is None


@pytest.mark.parametrize("interval", [(0.0, 1.0), (1.0, 0.0)])
def test_dopri5_steps_exactly_to_the_end(interval):
    # Without step_t torchdiffeq steps past the end, and the clamped field would be evaluated at the end.
    # With step_t, the last two stages are evaluated just before the end, and none beyond it.
    field = Recorder(rate=2.0)
    solution = solve(field, points(torch.float32), interval, Solver("dopri5"))
    end = interval[1]
    assert end not in field.times
    assert field.times.count(pytest.approx(end, abs=1e-6)) == 2
    assert solution.nfe == 2 + 6 * (solution.accepted + solution.rejected)


def test_rejected_steps_are_counted():
    solution = solve(lambda t, x: -200 * (x - torch.cos(20 * t)), points(), (0.0, 1.0), Solver("dopri5"))
    assert solution.rejected > 0
    assert solution.nfe == 2 + 6 * (solution.accepted + solution.rejected)


def test_the_first_probe_of_a_slow_field_does_not_leave_the_interval():
    times = []
    solve(
        lambda t, x: (times.append(float(t)), 0.001 * torch.ones_like(x))[1],
        5 + points(),
        (0.0, 1.0),
        Solver(),
    )
    assert max(times) <= 1.0


@settings(deadline=None, max_examples=30)
@given(
    method=st.sampled_from(sorted(STAGES)),
    steps=st.integers(1, 40),
    start=st.floats(0, 0.4),
    end=st.floats(0.6, 1),
    backwards=st.booleans(),
)
def test_fixed_methods_take_the_requested_steps(method, steps, start, end, backwards):
    interval = (end, start) if backwards else (start, end)
    solution = solve(Recorder(), points(), interval, Solver(method, steps=steps))
    assert solution.nfe == steps * STAGES[method]
    assert (solution.accepted, solution.rejected) == (steps, 0)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("heun3", 3), ("rk4", 4)]
)
def test_fixed_methods_converge_at_their_order(method, order):
    errors = []
    for steps in (20, 40):
        field = Recorder(rate=2.0)
        x = solve(field, points(), (0.0, 0.7), Solver(method, steps=steps)).x
        errors.append(float((x - field.exact(points(), 0, 0.7)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


def test_euler_is_eulers():
    x = points()
    expected = x + 0.25 * (-x)
    expected = expected + 0.25 * (-expected * math.cos(0.75))
    actual = solve(Recorder(), points(), (0.0, 0.5), Solver("euler", steps=2)).x
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("at", [[0.0, 0.3, 1.0], [0.25, 0.75], [1.0], [0.0]])
@pytest.mark.parametrize(
    "solver",
    [Solver(rtol=1e-8, atol=1e-8), Solver("rk4", steps=400), Solver("scipy_solver", rtol=1e-8, atol=1e-8)],
)
def test_trajectories_pass_through_the_times_asked_for(at, solver):
    field = Recorder()
    plain = solve(field, points(), (0.0, 1.0), solver)
    solution = solve(field, points(), (0.0, 1.0), solver, at=at)
    assert solution.trajectory.shape == (len(at), 3, 2)
    assert solution.times.tolist() == at
    expected = torch.stack([field.exact(points(), 0, t) for t in at])
    torch.testing.assert_close(solution.trajectory, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(solution.x, plain.x)
    assert solution.nfe == plain.nfe


@pytest.mark.parametrize("at", [[], [0.5, 0.5], [0.7, 0.2], [0.2, 1.2], [-0.1]])
def test_trajectory_times_out_of_order_are_refused(at):
    with pytest.raises(ValueError, match="trajectory times"):
        solve(Recorder(), points(), (0.0, 1.0), Solver(), at=at)


def test_backward_trajectories_run_backwards():
    solution = solve(Recorder(), points(), (1.0, 0.0), Solver(), at=[1.0, 0.5, 0.0])
    torch.testing.assert_close(solution.trajectory[0], points())
    torch.testing.assert_close(solution.trajectory[-1], solution.x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rk45"}, "unknown solver"),
        ({"method": "explicit_adams", "steps": 40}, "is inaccurate"),
        ({"method": "dopri5", "steps": 10}, "ignore steps"),
        ({"method": "dopri5", "rtol": 0.0}, "rtol must be positive"),
        ({"method": "euler"}, "needs steps"),
        ({"method": "euler", "steps": 0}, "needs steps"),
        ({"method": "euler", "steps": 10, "rtol": 1e-5}, "ignore rtol"),
        ({"method": "euler", "steps": 10, "atol": 1e-5}, "ignore rtol and atol"),
        ({"method": "midpoint", "steps": 10, "error_norm": "worst"}, "ignore error_norm"),
        ({"method": "scipy_solver", "error_norm": "worst"}, "ignore error_norm"),
        ({"error_norm": "max"}, "error_norm"),
    ],
)
def test_settings_that_would_be_ignored_or_are_missing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Solver(**settings)


def test_the_papers_tolerances_are_the_default():
    assert (Solver().method, Solver().rtol, Solver().atol) == ("dopri5", 1e-5, 1e-5)
    assert Solver("implicit_adams", steps=5).rtol == 1e-5


def test_worst_norm_takes_as_many_steps_as_the_worst_example_needs():
    def field(t, x):
        rate = torch.tensor([1.0, 30.0], dtype=x.dtype)[: len(x), None] if len(x) > 1 else 30.0
        return -rate * (x - torch.cos(t))

    both = torch.ones(2, 4, dtype=torch.float64)
    second_only = solve(field, both[1:], (0.0, 1.0), Solver())
    assert solve(field, both, (0.0, 1.0), Solver(error_norm="worst")).nfe == second_only.nfe
    assert solve(field, both, (0.0, 1.0), Solver()).nfe < second_only.nfe


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_field_that_is_not_finite_is_an_error(bad):
    for solver in (Solver(), Solver("euler", steps=3)):
        with pytest.raises(ArithmeticError):
            solve(lambda t, x: x * bad, points(), (0.0, 1.0), solver)


def test_half_precision_states_are_solved_in_float32_and_without_gradients():
    weight = torch.ones((), requires_grad=True)
    solution = solve(lambda t, x: weight * x, points().to(torch.bfloat16), (0.0, 1.0), Solver())
    assert solution.x.dtype == torch.float32
    assert not solution.x.requires_grad


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="empty"):
        integrate(lambda t, state: state, (points(),), (0.5, 0.5), Solver())
