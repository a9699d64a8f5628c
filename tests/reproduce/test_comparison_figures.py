"""Figures of a comparison on images show the given data."""

import io

import numpy as np
import torch
from PIL import Image

from fm_core.reproduce.comparison_figures import trajectories_from_one_noise
from fm_core.reproduce.comparison_page import _trajectories


def brightening(start: int) -> torch.Tensor:
    """A trajectory of 17 times, uint8 [T, C, H, W] of 17 intensity levels, from `start` to 16."""
    return torch.linspace(start, 16, 17).round().to(torch.uint8).view(17, 1, 1, 1).expand(17, 1, 8, 8)


def test_a_trajectory_goes_from_noise_on_the_left_to_data_on_the_right_one_row_per_objective():
    picture = Image.open(
        io.BytesIO(trajectories_from_one_noise({"first": brightening(0), "second": brightening(8)}, 17))
    )
    pixels = np.asarray(picture.convert("L")).astype(int)
    first, second = len(pixels) // 4 - 20, 3 * len(pixels) // 4 - 20  # above the label
    # A black line closes each of the nine images.
    dark = np.flatnonzero(pixels[second] < 20)
    lines = dark[np.flatnonzero(np.diff(dark, append=dark[-1] + 9) > 1)]
    assert len(lines) == 9
    middles = lines - np.diff(lines).mean().astype(int) // 2
    for row, start in ((first, 0), (second, 8)):
        expected = np.linspace(start, 16, 17).round()[::2] * 255 / 16
        assert np.abs(pixels[row, middles] - expected).max() < 2
    one = Image.open(io.BytesIO(trajectories_from_one_noise({"first": brightening(0)}, 17)))
    assert one.width == picture.width
    assert one.height < picture.height


def results(*runs):
    summary = {run: {"title": run.upper(), "runs": [run]} for run in runs}
    return {"summary": summary, "config": {"sample": {"solver": "dopri5"}}}


def tensors(images: int) -> dict[str, torch.Tensor]:
    trajectory = brightening(0)[:, None].expand(17, images, 1, 8, 8)
    return {"levels": torch.tensor(17), "trajectory": trajectory}


def test_as_many_trajectories_are_shown_as_every_objective_has_and_none_where_none_was_saved():
    (section,) = _trajectories(results("a", "b"), {"a": tensors(8), "b": tensors(2)})
    assert len(section.parts) == 2
    assert "dopri5" in section.note
    assert _trajectories(results("a"), {"a": {"levels": torch.tensor(17)}}) == []
