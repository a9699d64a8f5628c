"""Metrics compared with torch-fidelity, torchmetrics and scipy on identical features.

torch-fidelity and torchmetrics are used only by tests, so this test installs them in a separate environment.
"""

import subprocess

import numpy as np
import pytest
import torch

from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.metrics.frechet import frechet_distance, frechet_distance_low_rank
from fm_core.evaluation.metrics.inception_score import inception_score
from fm_core.evaluation.metrics.kid import kernel_distance
from fm_core.evaluation.metrics.precision_recall import precision_and_recall
from fm_core.evaluation.protocol_scores import split_inception_score
from tests.support import ROOT


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(0, -3, 96).exp()
    x = (torch.randn(700, 96, generator=generator) * spectrum + 0.2).relu()
    y = (torch.randn(900, 96, generator=generator) * spectrum * 1.2 + 0.1).relu()
    return {"x": x, "y": y, "logits": torch.randn(700, 50, generator=generator) * 2}


INPUTS = make_inputs()
X, Y = INPUTS["x"], INPUTS["y"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, public_environment):
    folder = tmp_path_factory.mktemp("answers")
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in INPUTS.items()})
    script = ["-m", "tests.support.public_metrics"]
    done = subprocess.run(
        [public_environment, *script, folder / "inputs.npz", folder / "answers.npz"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name: float(value) for name, value in np.load(folder / "answers.npz").items()}


@pytest.mark.parametrize("package", ["scipy", "torch_fidelity", "torchmetrics"])
def test_frechet_distance(answers, package):
    reference = Gaussian.of(FeatureMoments.of(Y))
    assert frechet_distance(FeatureMoments.of(X), reference) == pytest.approx(
        answers[f"{package}.fid"], rel=1e-6
    )
    assert frechet_distance_low_rank(X, reference) == pytest.approx(answers[f"{package}.fid"], rel=1e-6)


def test_inception_score(answers):
    score = inception_score(INPUTS["logits"].double().softmax(1))
    assert score.value == pytest.approx(answers["torch_fidelity.isc"], rel=1e-6)


def test_inception_score_of_splits(answers):
    value, deviation = split_inception_score(INPUTS["logits"].double().softmax(1), 10, "shuffled")
    assert value == pytest.approx(answers["torch_fidelity.isc_of_splits"], rel=1e-9)
    assert deviation == pytest.approx(answers["torch_fidelity.std_over_splits"], rel=1e-9)


@pytest.mark.parametrize("package", ["torch_fidelity", "torchmetrics"])
def test_kernel_distance(answers, package):
    assert kernel_distance(X, Y[: len(X)]).value == pytest.approx(answers[f"{package}.kid"], rel=1e-6)


def test_precision_and_recall(answers):
    result = precision_and_recall(X, Y)
    assert result.precision == pytest.approx(answers["torch_fidelity.precision"], rel=1e-6)
    assert result.recall == pytest.approx(answers["torch_fidelity.recall"], rel=1e-6)
