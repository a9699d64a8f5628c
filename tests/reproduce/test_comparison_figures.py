"""Figures of a comparison on images show the given data."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from fm_core.reproduce.comparison_figures import score_error_bars, trajectory_galleries
from fm_core.reproduce.comparison_page import _trajectories


def brightening(start: int, images: int = 1) -> torch.Tensor:
    """Trajectories of 17 times, uint8 [T, n, C, H, W] of 17 intensity levels, from `start` to 16."""
    levels = torch.linspace(start, 16, 17).round().to(torch.uint8)
    return levels.view(17, 1, 1, 1, 1).expand(17, images, 1, 8, 8)


def test_a_trajectory_goes_from_noise_on_the_left_to_data_on_the_right_one_row_per_objective():
    trajectories = {"first": brightening(0), "second": brightening(8)}
    (gallery,) = trajectory_galleries(trajectories, levels=17, count=1)
    assert [unit.label for unit in gallery.units] == ["first", "second"]
    for unit, start in zip(gallery.units, (0, 8), strict=True):
        expected = np.linspace(start, 16, 17).round()[::2] * 255 / 16
        pixels = [
            Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).getpixel((4, 4))
            for uri in unit.uris
        ]
        assert np.abs(np.array(pixels) - expected).max() < 1


def test_errors_of_scores_are_drawn_where_two_objectives_have_them():
    score = {"value": 2.0, "stderr": 0.5}
    rows = [
        {"title": "A", "frechet_distance": score, "bits_per_dim": score},
        {"title": "B", "frechet_distance": score},
    ]
    (figure,) = score_error_bars(rows)
    assert figure.caption.startswith("Fréchet distance")
    assert score_error_bars(rows[:1]) == []


def results(*runs):
    summary = {run: {"title": run.upper(), "runs": [run]} for run in runs}
    return {"summary": summary, "config": {"sample": {"solver": "dopri5"}}}


def tensors(images: int) -> dict[str, torch.Tensor]:
    return {"levels": torch.tensor(17), "trajectory": brightening(0, images)}


def test_as_many_trajectories_are_shown_as_every_objective_has_and_none_where_none_was_saved():
    (section,) = _trajectories(results("a", "b"), {"a": tensors(8), "b": tensors(2)})
    assert len(section.parts) == 2
    assert "dopri5" in section.note
    assert _trajectories(results("a"), {"a": {"levels": torch.tensor(17)}}) == []
