"""Time grids: definitions, ends, and the final Euler step of some grids."""

import math
from itertools import pairwise

import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.affine import Affine
from fm_core.method.objectives import DataPrediction
from fm_core.method.ode import Solver, solve
from fm_core.method.solver import EVALUATIONS_PER_STEP, FIXED, MULTISTEP
from fm_core.method.step_loop import check_steps
from fm_core.method.time_grid import TimeGrid, grid_of, half_log_snr
from tests.support.gaussian_mixtures import PATHS, two_components

OT, VP, VE = (PATHS[name] for name in ("optimal-transport", "variance-preserving", "variance-exploding"))
NAMES = ("uniform", "log-snr", "edm", "cosine", "shift")


def grid(name):
    return TimeGrid(name, shift=3.0 if name == "shift" else None)


def half_log_snr_at(path, times):
    return half_log_snr(path, torch.tensor(times, dtype=torch.float64))


def differences(values):
    return (values[1:] - values[:-1]).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_grid_increases_from_end_to_end_of_the_interval(path, name, steps):
    interval = PATHS[path].interval
    times = grid(name).on(interval, steps, PATHS[path]).times
    assert (len(times), times[0], times[-1]) == (steps + 1, *interval)
    assert all(a < b for a, b in pairwise(times))


def test_grids_stay_inside_the_interval_of_the_objective():
    interval = DataPrediction(OT).interval
    times = TimeGrid("log-snr").on(interval, 5, OT).times
    assert interval[1] < 1
    assert max(times) == interval[1]


def test_log_snr_steps_are_equal_where_log_snr_is_finite():
    for path in (VP, VE):
        grid_times = TimeGrid("log-snr").on(path.interval, 6, path)
        steps = differences(half_log_snr_at(path, grid_times.times))
        assert steps == pytest.approx([steps[0]] * 6, rel=1e-6)
        assert not grid_times.euler_last


def test_where_log_snr_is_infinite_the_grid_is_cut_at_the_bounds():
    grid_times = TimeGrid("log-snr", bounds=(0.01, 50.0)).on((0.0, 1.0), 5, OT)
    # The start replaces the time with nu = 50 as the first time; nu = 0.01 is at the second-to-last time.
    nu = torch.exp(-half_log_snr_at(OT, grid_times.times[1:-1])).tolist()
    assert nu == pytest.approx([50 * (0.01 / 50) ** (i / 4) for i in (1, 2, 3, 4)], rel=1e-9)
    assert grid_times.euler_last
    assert TimeGrid("log-snr").on((0.0, 1.0), 1, OT).times == (0.0, 1.0)


def test_the_edm_grid_is_edms():
    times = TimeGrid("edm").on((0.0, 1.0), 18, OT).times
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(1, 18)]
    assert torch.exp(-half_log_snr_at(OT, times[1:-1])).tolist() == pytest.approx(expected, rel=1e-9)
    other = TimeGrid("edm", rho=1.0, bounds=(0.5, 4.5)).on((0.0, 1.0), 5, OT).times
    assert torch.exp(-half_log_snr_at(OT, other[1:-1])).tolist() == pytest.approx([3.5, 2.5, 1.5, 0.5])


def test_the_cosine_grid_is_uniform_on_the_cosine_path_and_cosmap_on_that_of_optimal_transport():
    times = TimeGrid("cosine").on((0.0, 1.0), 8, PATHS["cosine"]).times
    assert times == pytest.approx([i / 8 for i in range(9)], abs=1e-12)
    straight = TimeGrid("cosine").on((0.0, 1.0), 8, type(OT)(sigma_min=0.0)).times
    assert straight[1:-1] == pytest.approx([1 - 1 / (math.tan(math.pi * i / 16) + 1) for i in range(1, 8)])


def test_the_shifted_grid_is_that_of_sd3():
    """In that paper t = 1 is noise: t' = shift t / (1 + (shift - 1) t)."""
    times = TimeGrid("shift", shift=3.0).on((0.0, 1.0), 4).times
    assert [1 - t for t in times] == pytest.approx([3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25, 0)])
    assert TimeGrid("shift", shift=1.0).on((0.0, 1.0), 4).times == TimeGrid().on((0.0, 1.0), 4).times


def test_a_list_is_taken_as_it_is():
    assert grid_of([0.0, 0.5, 1.0]).on((0.0, 1.0), 2, OT).times == (0.0, 0.5, 1.0)
    assert Solver("midpoint", grid=grid_of([0.0, 0.5, 1.0])).steps == 2
    with pytest.raises(UserError, match=r"from 0 to 0\.99999; begin and end the list there"):
        check_steps(Solver("ddim", grid=grid_of([0.0, 0.5, 1.0])), VP.interval, VP)


@pytest.mark.parametrize("method", [name for name in EVALUATIONS_PER_STEP if name not in ("sde", "flow_map")])
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_solver_follows_every_grid_and_counts_its_evaluations(method, name):
    times = []

    def velocity(t, x):
        times.append(float(t))
        return two_components(OT)(t, x)

    x = torch.ones(2, 1, dtype=torch.float64)
    solver = Solver(method, steps=4, grid=grid(name))
    solution = solve(velocity, x, (0.0, 1.0), solver, path=OT)
    grid_times = solver.grid.on((0.0, 1.0), 4, OT)
    per_step = EVALUATIONS_PER_STEP[method]
    # EDM's sampler begins with an Euler step where alpha is 0.
    euler_steps = 2 if method == "edm" else int(grid_times.euler_last)
    assert solution.nfe == len(times) == 4 * per_step - euler_steps * (per_step - 1)
    assert all(min(abs(t - seen) for seen in times) < 1e-9 for t in grid_times.times[:-1])
    assert max(times) <= 1


@pytest.mark.parametrize("method", ["midpoint", "rk4", *MULTISTEP])
def test_the_last_interval_of_a_cut_grid_is_one_euler_step_in_the_x1_form(method):
    """An Euler step from nu = 0.5 to the end gives E[x1] up to sigma_min."""
    velocity, x = two_components(OT), torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    solver = Solver(method, steps=2, grid=TimeGrid("log-snr", bounds=(0.5, 20.0)))
    t = solver.grid.on((0.0, 1.0), 2, OT).times[1]
    first = Solver("euler" if method in MULTISTEP else method, steps=1)
    state = solve(velocity, x, (0.0, t), first).x
    data = state + OT.sigma(torch.tensor(t)) * velocity(torch.tensor(t, dtype=torch.float64), state)
    if method == "unipc":  # its last step begins from the corrected state
        return
    torch.testing.assert_close(solve(velocity, x, (0.0, 1.0), solver, path=OT).x, data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "karras"}, "unknown time grid 'karras'; allowed: uniform, log-snr, edm, cosine, shift, or"),
        ({"name": "cosine", "rho": 5.0}, "time grid cosine would ignore rho, which is of edm"),
        ({"bounds": (0.1, 1.0)}, "time grid uniform would ignore bounds, which is of log-snr and edm"),
        ({"name": "edm", "rho": -1.0}, "rho must be positive"),
        ({"name": "edm", "bounds": (2.0, 1.0)}, "bounds must be positive and increase"),
        ({"name": "shift"}, "needs a positive shift, e.g. 3"),
        ({"name": "list", "times": (0.0, 0.5, 0.5)}, "at least two times that increase"),
    ],
)
def test_settings_that_are_wrong_or_would_be_ignored_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TimeGrid(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "dopri5", "grid": TimeGrid("log-snr")},
            "chooses its own steps and would ignore the time grid",
        ),
        (
            {"method": "implicit_adams", "steps": 4, "grid": TimeGrid("cosine")},
            "takes equal steps and would ignore",
        ),
        (
            {"method": "euler", "steps": 4, "grid": grid_of([0.0, 1.0])},
            "the time grid has 1 steps; give one of the two",
        ),
        ({"method": "ddim"}, "needs steps"),
        ({"method": "unipc", "steps": 4, "rtol": 1e-3}, "would ignore rtol and atol"),
        ({"method": "ab2", "steps": 4, "error_norm": "worst"}, "would ignore error_norm"),
    ],
)
def test_solvers_refuse_what_they_would_ignore(settings, message):
    with pytest.raises(UserError, match=message):
        Solver(**settings)


def test_steps_that_float32_cannot_tell_apart_and_paths_without_log_snr_are_refused():
    with pytest.raises(UserError, match="too short for float32"):
        check_steps(Solver("ddim", steps=40, grid=TimeGrid("shift", shift=1e-8)), (0.0, 1.0), OT)
    with pytest.raises(UserError, match=r"between the bounds 0\.01 and 0\.02"):
        check_steps(Solver("ddim", steps=4, grid=TimeGrid("edm", bounds=(0.01, 0.02))), (0.0, 0.5), OT)
    constant = Affine(lambda t: t.clamp(0.25, 0.5) + 0.1, lambda t: 1 - t.clamp(0.25, 0.5))
    with pytest.raises(UserError, match="does not increase at t = 0"):
        check_steps(Solver("ddim", steps=4), (0.0, 1.0), constant)


def test_a_uniform_grid_is_what_it_always_was():
    """Sample sets of earlier versions have no grid in their protocol, and were solved by torchdiffeq."""
    assert Solver("midpoint", steps=3).plain
    assert Solver("midpoint", steps=3).record == {"solver": "midpoint", "steps": 3}
    assert all(Solver(method, steps=3).plain for method in FIXED)
    shifted = Solver("midpoint", steps=3, grid=TimeGrid("shift", shift=1.0))
    arguments = two_components(OT), torch.ones(2, 1, dtype=torch.float64), (0.0, 1.0)
    assert not shifted.plain
    torch.testing.assert_close(solve(*arguments, shifted).x, solve(*arguments, Solver("midpoint", steps=3)).x)
