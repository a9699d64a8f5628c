"""Encoded image files to arrays of one size."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fm_core.errors import ImageDecodingError

Image.MAX_IMAGE_PIXELS = None  # the largest images of ILSVRC are honest ones

RESIZE_TEXTS = {
    "squash-box": "whole image squashed to a square by the box filter",
    "crop-adm": "halved by the box filter, bicubic to the size, centre crop",
    "exact": "none",
}


def decode(content: bytes, size: int, resize: str) -> NDArray[np.uint8]:
    """An encoded image as uint8 [3, size, size]; grey, CMYK and palette images are converted.

    Raises ImageDecodingError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF data and palettes say nothing of the pixels
            picture = _to_rgb(Image.open(io.BytesIO(content)))
    except Exception:  # Pillow raises a dozen kinds for damaged files, struct.error among them
        raise ImageDecodingError("unreadable") from None
    if resize == "exact" and picture.size != (size, size):
        raise ImageDecodingError("another size")
    if min(picture.size) < 1:
        raise ImageDecodingError("empty")
    if resize == "squash-box":
        picture = picture.resize((size, size), Image.Resampling.BOX)
    elif resize == "crop-adm":
        picture = _crop_adm(picture, size)
    return np.ascontiguousarray(np.asarray(picture, np.uint8).transpose(2, 0, 1))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow would clip 16 bits to 8 instead of scaling them.
        grey = (np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    return picture.convert("RGB")


def _crop_adm(picture: Image.Image, size: int) -> Image.Image:
    while min(picture.size) >= 2 * size:
        half = (picture.size[0] // 2, picture.size[1] // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = size / min(picture.size)
    target = (round(picture.size[0] * scale), round(picture.size[1] * scale))
    picture = picture.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return picture.crop((left, top, left + size, top + size))
