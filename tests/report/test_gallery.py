"""Galleries: integer factors, and budgets that the images keep."""

import base64
import io

import pytest
import torch
from PIL import Image

from fm_core.report.gallery import SAMPLE_SIDE, factor_for
from fm_core.report.gallery_encoding import animations, encode, gallery


def noise(*shape: int) -> torch.Tensor:
    """Random noise, which no encoding makes small."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def size(units) -> int:
    return sum(len(uri) for unit in units for uri in unit)


@pytest.mark.parametrize(("side", "shown"), [(8, 80), (16, 80), (28, 84), (32, 96), (64, 128), (256, 256)])
def test_images_are_enlarged_by_integer_factors_to_a_size_one_can_see(side, shown):
    assert side * factor_for(side, SAMPLE_SIDE) == shown
    made = gallery(noise(2, 1, 3, side, side), 256, ["a", "b"], "{count} images", budget=10**6)
    assert (made.width, made.height, made.enlarged) == (shown, shown, shown > side)
    assert made.caption == "2 images"


def test_images_that_fit_are_stored_exactly():
    images = torch.randint(0, 17, (3, 2, 1, 4, 4), dtype=torch.uint8)
    units = encode(images, 17, budget=10_000)
    picture = opened(units[2][1])
    assert picture.format == "PNG"
    expected = (images[2, 1, 0].double() * 255 / 16).round().flatten().tolist()
    assert list(picture.tobytes()) == expected


@pytest.mark.parametrize("side", [64, 256])
def test_a_budget_is_kept_by_jpeg_and_by_fewer_images(side):
    images = noise(12, 2, 3, side, side)
    for budget in (3_000_000, 300_000, 10_000):
        units = encode(images, 256, budget)
        assert 1 <= len(units) <= 12
        assert size(units) <= budget
        assert all(len(unit) == 2 for unit in units)
        if len(units) < 12:
            assert opened(units[0][0]).format == "JPEG"
    made = gallery(images, 256, [str(i) for i in range(12)], "{count}", budget=60_000)
    assert int(made.caption) == len(made.units) < 12


def test_animations_are_left_out_where_none_fits():
    trajectory = noise(5, 2, 3, 16, 16)
    made = animations(trajectory, 256, "caption", budget=30_000)
    assert made is not None
    assert opened(made.units[0].uris[0]).n_frames == 5
    assert opened(made.units[0].still).n_frames == 1
    assert animations(trajectory, 256, "caption", budget=1_000) is None


def test_a_sheet_has_every_image_in_its_place():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1, 1).expand(12, 1, 1, 8, 8)
    made = gallery(images, 17, [""] * 12, "", budget=10**6, labels=["name"] * 12)
    sheet = Image.open(io.BytesIO(made.sheet())).convert("L")
    assert sheet.size == (8 * 88 - 8, 2 * 102 - 8)
    for number in range(12):
        left, top = number % 8 * 88, number // 8 * 102
        assert sheet.crop((left, top, left + 80, top + 80)).getextrema() == (round(number * 255 / 16),) * 2
