"""Galleries from tensors within a budget of bytes: PNG if all images fit, else JPEG or fewer images."""

import io
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from fm_core.report.gallery import SAMPLE_SIDE, Gallery, Unit, data_uri, factor_for
from fm_core.report.image_grids import animation, grid, png

SAMPLES_BUDGET, PAIRS_BUDGET, STRIPS_BUDGET, ANIMATIONS_BUDGET = 800_000, 600_000, 400_000, 400_000
"""Maximum number of bytes of each gallery in a page, as text."""
JPEG_QUALITY = 85


def gallery(
    units: Tensor,
    levels: int,
    names: Sequence[str],
    caption: str,
    *,
    budget: int,
    labels: Sequence[str] = (),
    least: int = SAMPLE_SIDE,
    sequence: bool = False,
) -> Gallery:
    """Build a gallery of the first units whose images fit into a budget.

    Args:
        units: images uint8 [units, n, C, H, W] of `levels` intensity levels; n are shown next to each other.
        levels: number of intensity levels.
        names: name of each unit, for screen readers.
        caption: caption of the gallery; `{count}` is replaced with the number of units that are shown.
        budget: maximum number of bytes of the images in a page.
        labels: label of each unit; may be empty.
        least: least displayed width in pixels of a page.
        sequence: whether the images of a unit are a sequence in time; n is odd, so that a narrow screen,
            which shows every second image, shows the first and the last.
    """
    encoded = encode(units, levels, budget)
    labels = labels or [""] * len(units)
    shown = [Unit(name, uris, label) for uris, name, label in zip(encoded, names, labels, strict=False)]
    return _gallery(shown, caption, units.shape[-2:], least, sequence)


def animations(
    trajectory: Tensor, levels: int, caption: str, budget: int = ANIMATIONS_BUDGET
) -> Gallery | None:
    """Build a gallery of animated trajectories from noise to data, uint8 [T, n, C, H, W].

    It has as many images as fit into the budget; None if there are none.
    """
    units = list[Unit]()
    for number in range(trajectory.shape[1]):
        frames = trajectory[:, number : number + 1]
        uri = data_uri(animation(frames, levels, 1, 1, line=0))
        still = data_uri(png(grid(frames[-1], levels, 1, 1, line=0)))
        budget -= len(uri) + len(still)
        if budget < 0:
            break
        units.append(Unit(f"trajectory of sample {number}", [uri], still=still))
    return _gallery(units, caption, trajectory.shape[-2:], SAMPLE_SIDE) if units else None


def encode(units: Tensor, levels: int, budget: int) -> list[list[str]]:
    """Encode images uint8 [units, n, C, H, W] as data: URIs of at most `budget` bytes in total.

    As PNG if all fit, else as JPEG, of as many units as fit but at least one, at half the size until it does.
    """
    pictures = [[_picture(image, levels) for image in unit] for unit in units]
    encoded = _fitting(pictures, _png_uri, budget)
    if len(encoded) == len(pictures):
        return encoded
    while not (encoded := _fitting(pictures, _jpeg_uri, budget)):
        pictures = [[picture.reduce(2) for picture in unit] for unit in pictures[:1]]
    return encoded


def _fitting(
    pictures: Sequence[Sequence[Image.Image]], encoder: Callable[[Image.Image], str], budget: int
) -> list[list[str]]:
    """Encode the first units, as many as fit into a budget of bytes."""
    encoded = list[list[str]]()
    for unit in pictures:
        uris = [encoder(picture) for picture in unit]
        budget -= sum(map(len, uris))
        if budget < 0:
            break
        encoded.append(uris)
    return encoded


def _gallery(
    units: Sequence[Unit], caption: str, shape: Sequence[int], least: int, sequence: bool = False
) -> Gallery:
    height, width = shape
    factor = factor_for(width, least)
    caption = caption.replace("{count}", str(len(units)))
    return Gallery(units, caption, width * factor, height * factor, factor > 1, sequence)


def _picture(image: Tensor, levels: int) -> Image.Image:
    return grid(image[None], levels, 1, 1, line=0)


def _png_uri(picture: Image.Image) -> str:
    return data_uri(png(picture))


def _jpeg_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return data_uri(buffer.getvalue(), "image/jpeg")
