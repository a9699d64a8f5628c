import io
import re

import pytest
import torch
from PIL import Image

from fm_core.method.registry import path_named
from fm_core.report.html import MAX_PAGE_BYTES
from fm_core.reproduce.toy2d.figures import (
    FigureData,
    conditional_field,
    conditional_fields,
    conditional_trajectories,
    histogram,
    lines_and_densities,
    samples_over_time_and_budget,
)
from fm_core.reproduce.toy2d.page import page_2d

PATHS = {name: path_named(name) for name in ("variance-preserving", "optimal-transport")}


def figure_data(label, points=30):
    g = torch.Generator().manual_seed(len(label))
    tensors = {
        "times": torch.linspace(0, 1, 25, dtype=torch.float64),
        "trajectory": torch.randn(25, points, 2, generator=g),
        "samples-4": torch.randn(points, 2, generator=g),
        "density": torch.rand(10, 10, generator=g) / 32,
    }
    return FigureData(label, tensors)


EXPERIMENTS = [figure_data("DDPM"), figure_data("CNF (60 of 6,000 steps)")]


def colors(png):
    picture = Image.open(io.BytesIO(png))
    assert picture.width > 300
    assert picture.height > 150
    return len(picture.convert("RGB").getcolors(10**6))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: conditional_fields(PATHS, ["variance-preserving"]),
        lambda: conditional_fields({"cosine": path_named("cosine")}, []),
        lambda: conditional_trajectories({"variance-exploding": path_named("variance-exploding")}),
        lambda: conditional_trajectories(PATHS),
        lambda: samples_over_time_and_budget(EXPERIMENTS, [4]),
        lambda: samples_over_time_and_budget(EXPERIMENTS, []),
        lambda: lines_and_densities(EXPERIMENTS),
    ],
)
def test_every_figure_is_an_image_with_content(draw):
    assert colors(draw().png()) > 100


def test_figures_are_the_same_every_time():
    first, second = (conditional_trajectories(PATHS).svg("paths") for _ in range(2))
    assert first == second


def test_a_histogram_is_a_density_with_rows_by_y():
    points = torch.tensor([[0.01, 2.01]] * 3 + [[9.0, 0.0]])
    counted = histogram(points)
    row, column = divmod(int(counted.argmax()), counted.shape[1])
    assert (row / counted.shape[0] * 10 - 5, column / counted.shape[1] * 10 - 5) == (2.0, 0.0)
    assert float(counted.sum()) * (10 / counted.shape[0]) ** 2 == pytest.approx(0.75)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_conditional_fields_are_those_of_the_paper(t):
    x = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    x1 = torch.tensor([0.8, -0.4], dtype=torch.float64)
    ot = conditional_field(PATHS["optimal-transport"], "velocity", x, x1, t)
    assert torch.allclose(ot, (x1 - (1 - 1e-5) * x) / (1 - (1 - 1e-5) * t))  # eq. 21
    s = 1 - t
    big_t, beta = torch.tensor(s * 0.1 + s**2 * 19.9 / 2), 0.1 + s * 19.9
    alpha2 = torch.exp(-big_t)
    vp = conditional_field(PATHS["variance-preserving"], "velocity", x, x1, t)
    assert torch.allclose(
        vp, -beta / 2 * (alpha2 * x - alpha2.sqrt() * x1) / (1 - alpha2), rtol=1e-5
    )  # eq. 19
    score = conditional_field(PATHS["variance-preserving"], "score", x, x1, t)
    assert torch.allclose(score, -(x - alpha2.sqrt() * x1) / (1 - alpha2), rtol=1e-5)


def results(failed):
    record = {
        "label": "CNF (60 of 6,000 steps)",
        "steps": 60,
        "nll": {"nats": 2.5, "bits": 3.61, "stderr_nats": 0.01, "excess_over_entropy_nats": 0.42},
        "nfe": {"dopri5": 44},
        "on_squares": {"4": 0.5, "dopri5": 0.75},
        "training_seconds": 100.0,
        "scoring_seconds": 10.0,
    }
    return {
        "protocol": {"nfe": [4], "data": "board", "layers": 5, "width": 512, "steps": 6000, "batch": 128},
        "entropy": {"nats": 3.4657, "bits": 5.0},
        "diffusion_paths": ["variance-preserving"],
        "cells": {"cnf": record},
        "failed": failed,
    }


def test_the_page_needs_no_other_file_and_shows_all_numbers():
    html = page_2d(results({}), EXPERIMENTS[1:], PATHS)
    assert html.count('<svg class="plot"') == 5
    assert all(
        uri.startswith(("data:image/png;base64,", "#")) for uri in re.findall(r'(?:src|href)="([^"]*)"', html)
    )
    for text in (
        "3.466",
        "5.000",
        "2.500 ± 0.010",
        "3.610",
        "0.420",
        "44",
        "75.0%",
        "CNF (60 of 6,000 steps)",
    ):
        assert text in html, text
    assert "Failed" not in html


@pytest.fixture
def many_objectives():
    """Seven objectives with as many points and trajectories as the paper's comparison has."""
    return [figure_data(f"objective {number}", points=2_000) for number in range(7)]


def test_a_page_of_many_objectives_is_smaller_than_three_megabytes(many_objectives):
    assert len(page_2d(results({}), many_objectives, PATHS)) < MAX_PAGE_BYTES


def test_the_page_without_a_finished_experiment_names_the_failed_ones():
    html = page_2d({**results({"ddpm": "DDPM: ArithmeticError: <nan>"}), "cells": {}}, [], PATHS)
    assert "DDPM: ArithmeticError: &lt;nan&gt;" in html
    assert html.count('<svg class="plot"') == 2
