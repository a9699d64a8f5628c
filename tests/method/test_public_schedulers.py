"""Agreement of samples with the corresponding schedulers of diffusers, for the same network and times."""

import subprocess

import numpy as np
import pytest
import torch

from fm_core.method.affine import Affine
from fm_core.method.ode import Solver, solve
from fm_core.method.paths import OptimalTransport, VariancePreserving, expand_like
from fm_core.method.solver import Diffusion
from fm_core.method.time_grid import grid_of
from tests.support import ROOT

STEPS = 12
OT, VP = OptimalTransport(sigma_min=0.0), VariancePreserving()
VE = Affine(lambda t: torch.ones_like(t), lambda t: 5.0 * (1 - t) + 0.01)
INTERVALS = {"ot": (0.02, 1.0), "vp": (0.0, 0.9), "ve": (0.0, 1.0)}
"""diffusers divides by alpha, and DDIM's schedule by sigma, so ot starts later and vp ends earlier."""
PATHS = {"ot": OT, "vp": VP, "ve": VE}


def times_of(name):
    start, end = INTERVALS[name]
    shares = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64) ** 1.3
    return (start + (end - start) * shares).clamp(start, end)


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(16, 3, dtype=torch.float64, generator=generator),
        "matrix": 0.7 * torch.randn(3, 3, dtype=torch.float64, generator=generator),
        "noise": torch.randn(STEPS, 16, 3, dtype=torch.float64, generator=generator),
    }
    for name, path in PATHS.items():
        t = times_of(name)
        inputs |= {f"{name}.t": t, f"{name}.sigma": path.sigma(t), f"{name}.alpha": path.alpha(t)}
        inputs[f"{name}.nu"] = path.sigma(t) / path.alpha(t)
    return inputs


INPUTS = make_inputs()


@pytest.fixture(scope="module")
def answers(tmp_path_factory, public_python):
    folder = tmp_path_factory.mktemp("answers")
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in INPUTS.items()})
    script = [public_python, "-m", "tests.support.public_diffusers"]
    arguments = [folder / "inputs.npz", folder / "answers.npz"]
    subprocess.run([*script, *arguments], cwd=ROOT, check=True, timeout=300)
    return {name: torch.from_numpy(value) for name, value in np.load(folder / "answers.npz").items()}


def velocity_on(path):
    """The velocity of the network of tests/support/public_diffusers.py, which predicts the noise."""

    def velocity(t, x):
        noise = torch.tanh(x @ INPUTS["matrix"] + 3 * t)
        alpha, sigma = expand_like(path.alpha(t), x), expand_like(path.sigma(t), x)
        data = (x - sigma * noise) / alpha
        return path.d_alpha(t) * data + path.d_sigma(t) * noise

    return velocity


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("ot", method) for method in ("dpmpp_2m", "dpmpp_3m", "unipc")),
        *(("vp", method) for method in ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "sde")),
        ("ve", "ab2"),  # LMSDiscreteScheduler of order 2, whose variable is sigma
    ],
)
def test_samples_agree(answers, name, method):
    path, interval = PATHS[name], INTERVALS[name]
    diffusion = Diffusion("sbdm") if method == "sde" else None  # DDIM with eta = 1
    solver = Solver(method, grid=grid_of(times_of(name).tolist()), diffusion=diffusion)
    x0 = INPUTS["x"] * (float(VE.sigma(torch.zeros(1))) if name == "ve" else 1.0)
    noise = lambda step: INPUTS["noise"][step]  # noqa: E731
    solution = solve(velocity_on(path), x0, interval, solver, path=path, noise=noise)
    torch.testing.assert_close(solution.x, answers[f"{name}.{method}"].double(), rtol=1e-5, atol=1e-5)
    assert solution.nfe == STEPS
