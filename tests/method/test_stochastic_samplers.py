"""Samplers that add noise: marginals, limits without noise, and refused settings."""

import math

import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.denoiser import Coefficients
from fm_core.method.ode import Solver, solve
from fm_core.method.solver import DIFFUSIONS, Churn, Diffusion
from fm_core.method.stochastic_samplers import replaced_share
from fm_core.method.time_grid import TimeGrid
from tests.support.gaussian_mixtures import PATHS, plane, two_components

OT, VP = PATHS["optimal-transport"], PATHS["variance-preserving"]
SAMPLES = 4_000


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sampled(path, solver, count=SAMPLES, dimensions=1):
    """Samples of the components of `two_components`, independently in each dimension."""
    x = path.source_std * normal(count, dimensions, seed=1)
    noise = lambda step: normal(count, dimensions, seed=100 + step)  # noqa: E731
    return solve(two_components(path), x, path.interval, solver, path=path, noise=noise)


def sde(form, scale=1.0):
    return Solver("sde", steps=300, diffusion=Diffusion(form, scale), grid=TimeGrid("cosine"))


EDM = Solver("edm", steps=100, churn=Churn(30.0), grid=TimeGrid("edm"))
STOCHASTIC = {
    # `constant` replaces all noise in each step near the data; after 300 steps its bias exceeds this error.
    **{f"sde-{form}": (OT, sde(form)) for form in DIFFUSIONS if form != "constant"},
    "sde-strong": (OT, sde("sigma", 4.0)),
    "sde-function": (OT, sde(lambda t: 2 * t * (1 - t))),
    "edm-churn": (OT, EDM),
    "vp-sde-sbdm": (VP, sde("sbdm")),
    "vp-edm-churn": (VP, EDM),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_moments_are_those_of_the_data_within_the_statistical_error(name):
    path, solver = STOCHASTIC[name]
    x = sampled(path, solver).x[:, 0]
    # Components at -0.7 and 0.7 with variance 0.05.
    second, fourth = 0.7**2 + 0.05, 0.7**4 + 6 * 0.7**2 * 0.05 + 3 * 0.05**2
    eighth = sum(
        math.comb(8, 2 * k) * 0.7 ** (8 - 2 * k) * 0.05**k * math.prod(range(1, 2 * k, 2)) for k in range(5)
    )
    errors = [math.sqrt(value / SAMPLES) for value in (second, fourth - second**2, eighth - fourth**2)]
    for power, expected, stderr in zip((1, 2, 4), (0.0, second, fourth), errors, strict=True):
        assert float((x**power).mean()) == pytest.approx(expected, abs=4 * stderr)
    # A deterministic solution is a function of the initial noise; this one is not.
    deterministic = sampled(path, Solver("ddim", steps=20)).x[:, 0]
    assert (x - deterministic).abs().mean() > 0.02


@pytest.mark.parametrize("form", [*DIFFUSIONS, lambda t: t**2])
def test_the_share_of_fresh_noise_is_the_integral_of_the_diffusion(form):
    t = torch.linspace(0.3, 0.4, 20_001, dtype=torch.float64)
    sigma = VP.sigma(t)
    named = {
        "sbdm": VP.diffusion(t) / 2,
        "constant": torch.ones_like(t),
        "sigma": sigma,
        "linear": 1 - t,
        "decreasing": (torch.cos(math.pi * t) + 1) ** 2 / 4,
        "increasing-decreasing": torch.sin(math.pi * t) ** 2,
    }
    coefficient = named[form] if isinstance(form, str) else form(t)
    expected = 1 - math.exp(-float(torch.trapezoid(2 * coefficient / sigma**2, t)))
    assert replaced_share(VP, Diffusion(form), 0.3, 0.4) == pytest.approx(expected, rel=1e-7)


def test_without_noise_the_samplers_are_ddim_and_a_second_order_method():
    arguments = two_components(OT), normal(5, 1, seed=2), (0.0, 1.0)
    silent = Solver("sde", steps=9, diffusion=Diffusion(scale=0.0))
    assert not silent.stochastic
    ddim = solve(*arguments, Solver("ddim", steps=9), path=OT).x
    torch.testing.assert_close(solve(*arguments, silent, path=OT).x, ddim)
    path = PATHS["affine"]
    arguments = two_components(path), normal(5, 1, seed=2), path.interval
    exact = solve(*arguments, Solver("dopri8", rtol=1e-9, atol=1e-9)).x
    errors = [
        float((solve(*arguments, Solver("edm", steps=steps), path=path).x - exact).abs().max())
        for steps in (20, 40)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)
    assert solve(*arguments, Solver("edm", steps=7), path=path).nfe == 13


def test_churn_raises_the_noise_between_its_bounds_only():
    drawn = []

    def noise(step):
        drawn.append(step)
        return torch.zeros(2, 1, dtype=torch.float64)

    grid = TimeGrid("edm", bounds=(0.01, 10.0))
    solver = Solver("edm", steps=6, churn=Churn(30.0, low=0.05, high=5.0), grid=grid)
    solve(two_components(OT), normal(2, 1, seed=3), (0.0, 1.0), solver, path=OT, noise=noise)
    times = grid.on((0.0, 1.0), 6, OT).times[:-1]
    nu = [at.sigma / at.alpha if at.alpha else math.inf for at in (Coefficients.at(OT, t) for t in times)]
    assert drawn == [step for step, value in enumerate(nu) if 0.05 <= value <= 5]
    assert drawn


def test_a_stochastic_solver_needs_noise_and_says_what_it_is():
    solver = Solver("sde", steps=3)
    assert (solver.stochastic, solver.record["stochastic"]) == (True, {"diffusion": "sbdm", "scale": 1.0})
    with pytest.raises(ValueError, match="needs a source of noise"):
        solve(plane(OT).velocity, normal(2, 2, seed=1), (0.0, 1.0), solver, path=OT)
    churned = Solver("edm", steps=3, churn=Churn(40.0, 0.05, 50.0, 1.003))
    assert churned.record["stochastic"] == {
        **{"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}
    }
    assert "stochastic" not in Solver("edm", steps=3).record


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "ddim", "steps": 3, "diffusion": Diffusion()},
            "ddim would ignore diffusion, which is of sde",
        ),
        ({"method": "sde", "steps": 3, "churn": Churn(1.0)}, "sde would ignore churn, which is of edm"),
    ],
)
def test_noise_that_a_solver_would_ignore_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Solver(**settings)
    with pytest.raises(UserError, match="unknown diffusion 'white'"):
        Diffusion("white")
    with pytest.raises(UserError, match="churn must be at least 0"):
        Churn(1.0, 2.0, 1.0)
