"""Scores of a known model: a network with the exact velocity from noise to a normal distribution."""

import math

import pytest
import torch
from torch import nn

from fm_core.config import Toy2dSection
from fm_core.method.registry import objective_named, path_named
from fm_core.reproduce.toy2d.checkerboard import ENTROPY, WINDOW, grid_centers, points
from fm_core.reproduce.toy2d.scoring import TRAJECTORY_TIMES, score_model
from fm_core.storage.keyed_random import CURRENT, Domain, KeyedRandom

PLANE = Toy2dSection(held_out=1100, samples=300, grid=24, nfe=(2, 4))
STD, MEAN = 0.6, torch.tensor([0.5, -0.25])


class ToNormal(nn.Module):
    """The velocity of x_t = t x1 + (1 - t) x0 with x1 = MEAN + STD x0; trajectories are straight lines."""

    def forward(self, t, x, label=None):
        scale = (1 - t + t * STD)[:, None]
        return MEAN + (STD - 1) * (x - t[:, None] * MEAN) / scale


@pytest.fixture(scope="module")
def evaluation():
    heard, random = [], KeyedRandom(CURRENT, 0, Domain.TOY2D_SCORING)
    objective = objective_named("flow-matching", path_named("optimal-transport"))
    result = score_model(
        ToNormal(), objective, PLANE, random, lambda share, what: heard.append((share, what))
    )
    assert [share for share, _ in heard] == sorted(share for share, _ in heard)
    assert heard[-1][0] == 1
    return result


def log_normal(x):
    return -((x - MEAN) / STD).square().sum(-1) / 2 - math.log(2 * math.pi * STD**2)


def test_the_nll_is_that_of_the_normal_distribution_on_validation_points(evaluation):
    exact = -log_normal(points(KeyedRandom(CURRENT, 0, Domain.TOY2D_SCORING), 0, 1100).double())
    nll = evaluation.scores["nll"]
    assert nll["nats"] == pytest.approx(float(exact.mean()), abs=1e-4)
    assert nll["bits"] == pytest.approx(nll["nats"] / math.log(2))
    assert nll["stderr_nats"] == pytest.approx(float(exact.std()) / math.sqrt(1100), rel=1e-3)
    assert nll["excess_over_entropy_nats"] == pytest.approx(nll["nats"] - ENTROPY)
    assert nll["worst_point_nats"] == pytest.approx(float(exact.max()), abs=1e-3)
    assert (nll["points"], nll["batch"]) == (1100, 1024)


def test_validation_points_are_not_training_points():
    held_out, training = (
        points(KeyedRandom(CURRENT, 0, domain), 0, 64) for domain in (Domain.TOY2D_SCORING, Domain.TOY2D)
    )
    assert not torch.equal(held_out, training)


def test_the_density_image_is_the_density(evaluation):
    x, y = grid_centers(24)
    exact = log_normal(torch.stack([x, y], dim=-1)).exp()
    assert torch.allclose(evaluation.tensors["density"], exact, rtol=0.02, atol=1e-4)
    mass = float(exact.sum()) * (2 * WINDOW / 24) ** 2
    assert evaluation.scores["mass_in_picture"] == pytest.approx(mass, rel=0.01)


def test_trajectories_are_the_straight_lines_of_the_same_noise(evaluation):
    times, lines = evaluation.tensors["times"], evaluation.tensors["trajectory"]
    assert lines.shape == (TRAJECTORY_TIMES, 300, 2)
    assert (float(times[0]), float(times[-1])) == (0, 1)
    for t, x in zip(times.float(), lines, strict=True):
        assert torch.allclose(x, (1 - t + t * STD) * lines[0] + t * MEAN, atol=1e-4)
    assert torch.allclose(lines[-1].mean(0), MEAN, atol=0.15)


def test_few_evaluations_start_from_the_noise_of_the_trajectories(evaluation):
    # The field is constant along a line, so the midpoint method is exact in a single step.
    for nfe in (2, 4):
        assert torch.allclose(
            evaluation.tensors[f"samples-{nfe}"], evaluation.tensors["trajectory"][-1], atol=1e-4
        )
    assert evaluation.scores["on_squares"]["2"] == pytest.approx(
        evaluation.scores["on_squares"]["dopri5"], abs=0.01
    )


def test_evaluations_are_counted(evaluation):
    nfe = evaluation.scores["nfe"]
    assert nfe["dopri5"] == 2 + 6 * (nfe["accepted"] + nfe["rejected"])
    assert nfe["batch"] == 300
