"""The kernel distance from moments is that over all pairs; its error agrees up to the choice of images."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fm_core.evaluation.metrics.kid import kernel_distance

SOURCE = Path(__file__).resolve().parents[2] / "infra" / "benchmarks" / "kernel_moments.py"


@pytest.fixture(scope="module")
def kernel_moments():
    spec = importlib.util.spec_from_file_location("kernel_moments", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shift", [0.0, 0.2])
@pytest.mark.parametrize(("n", "m", "dimension"), [(1200, 900, 8), (600, 700, 3)])
def test_the_distance_and_its_error_are_those_over_all_pairs(
    kernel_moments, monkeypatch, n, m, dimension, shift
):
    monkeypatch.setattr(kernel_moments, "CHUNK", 256)
    monkeypatch.setattr(kernel_moments, "INFLUENCE_IMAGES", 500)
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, dimension, generator=generator) + shift
    y = torch.randn(m, dimension, generator=generator)
    ours, theirs = kernel_moments.kernel_distance_by_moments(x, y), kernel_distance(x, y)
    assert ours.value == pytest.approx(theirs.value, abs=1e-12)
    assert ours.stderr == pytest.approx(theirs.stderr, rel=0.1)
