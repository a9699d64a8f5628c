"""Decoding and resizing of encoded image files."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fm_core.errors import ImageDecodingError

Image.MAX_IMAGE_PIXELS = None  # some valid images of ILSVRC exceed the limit

RESIZE_TEXTS = {
    "squash-box": "whole image squashed to a square by the box filter",
    "crop-adm": "halved by the box filter, bicubic to the size, centre crop",
    "exact": "none",
}


def decode(content: bytes, size: int, resize: str) -> NDArray[np.uint8]:
    """Decode an image to uint8 [3, size, size]; gray, CMYK and palette images are converted to RGB.

    Raises ImageDecodingError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of EXIF data and palettes do not concern the pixels
            image = _to_rgb(Image.open(io.BytesIO(content)))
    except Exception:  # Pillow raises many kinds of exceptions, struct.error among them
        raise ImageDecodingError("unreadable") from None
    if resize == "exact" and image.size != (size, size):
        raise ImageDecodingError("another size")
    if min(image.size) < 1:
        raise ImageDecodingError("empty")
    if resize == "squash-box":
        image = image.resize((size, size), Image.Resampling.BOX)
    elif resize == "crop-adm":
        image = _crop_adm(image, size)
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit values to 8 bits instead of scaling them.
        gray = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    return image.convert("RGB")


def _crop_adm(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        half = (image.size[0] // 2, image.size[1] // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.size[0] * scale), round(image.size[1] * scale))
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return image.crop((left, top, left + size, top + size))
