"""Agreement of formulas with the public packages torchcfm, flow-matching and POT."""

import subprocess

import numpy as np
import pytest
import torch

from fm_core.method.divergence import Exact
from fm_core.method.likelihood import log_density
from fm_core.method.minibatch_ot import MinibatchOptimalTransport
from fm_core.method.objectives import DataPrediction, NoisePrediction
from fm_core.method.ode import Solver
from fm_core.method.paths import Cosine, OptimalTransport, VariancePreserving
from tests.support import ROOT


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    x0, x1, x = torch.randn(3, 64, 3, dtype=torch.float64, generator=generator)
    t = 0.01 + 0.98 * torch.rand(64, dtype=torch.float64, generator=generator)
    matrix = 0.7 * torch.randn(3, 3, dtype=torch.float64, generator=generator)
    return {"x0": x0, "x1": x1, "x": x, "t": t, "matrix": matrix}


INPUTS = make_inputs()


@pytest.fixture(scope="module")
def answers(tmp_path_factory, public_python):
    folder = tmp_path_factory.mktemp("answers")
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in INPUTS.items()})
    script = [public_python, "-m", "tests.support.public_flow_matching"]
    arguments = [folder / "inputs.npz", folder / "answers.npz"]
    subprocess.run([*script, *arguments], cwd=ROOT, check=True, timeout=300)
    return {name: torch.from_numpy(value) for name, value in np.load(folder / "answers.npz").items()}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def sample(path):
    return path.sample(INPUTS["x0"], INPUTS["x1"], INPUTS["t"])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("torchcfm.straight", OptimalTransport(0.0)),
        ("torchcfm.trigonometric", Cosine()),
        ("torchcfm.target.0.1", OptimalTransport(0.1)),
        ("torchcfm.target.0.001", OptimalTransport(1e-3)),
        ("flow_matching.ot", OptimalTransport(0.0)),
        ("flow_matching.vp", VariancePreserving()),
        ("flow_matching.cosine", Cosine()),
    ],
)
def test_samples_and_targets_agree(answers, name, path):
    close(sample(path).x_t, answers[f"{name}.x_t"])
    close(sample(path).velocity, answers[f"{name}.velocity"])


def test_the_target_of_the_packages_own_straight_path_agrees(answers):
    close(sample(OptimalTransport(0.0)).velocity, answers["flow_matching.condot.velocity"])


@pytest.mark.parametrize(
    ("name", "path"),
    [("ot", OptimalTransport(0.0)), ("vp", VariancePreserving()), ("cosine", Cosine())],
)
def test_velocities_from_data_and_noise_agree(answers, name, path):
    t, x = INPUTS["t"], INPUTS["x"]
    close(DataPrediction(path).velocity_from(INPUTS["x1"], t, x), answers[f"flow_matching.{name}.from_data"])
    if name == "vp":  # the other two are refused, because their formula divides by zero at t = 0
        actual = NoisePrediction(path).velocity_from(INPUTS["x0"], t, x)
        close(actual, answers[f"flow_matching.{name}.from_noise"])


def test_log_densities_agree(answers):
    def velocity(t, x):
        return torch.tanh(x @ INPUTS["matrix"]) * (1 + t)

    actual = log_density(velocity, INPUTS["x1"], (0.0, 1.0), Solver("rk4", steps=50), Exact())
    close(actual.log_density, answers["flow_matching.log_density"])


def test_the_optimal_coupling_agrees(answers):
    paired, _, _ = MinibatchOptimalTransport(block=64).pair(INPUTS["x0"], INPUTS["x1"])
    close(paired, answers["pot.plan"] @ INPUTS["x0"])
