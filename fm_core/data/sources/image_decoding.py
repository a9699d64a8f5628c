"""Decoding of image files and arrays to 8-bit RGB, and resizing; values are never clipped."""

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from fm_core.errors import AmbiguousIntensitiesError, ImageDecodingError

Image.MAX_IMAGE_PIXELS = None  # some valid images of ILSVRC exceed Pillow's limit; MAX_PIXELS replaces it

MAX_PIXELS = 2**28
"""Pixels of the largest image that is decoded; it takes 800 MB of memory."""
MAX_ASPECT = 128
"""Largest aspect ratio of an image that is resized."""
NPY_MAGIC = b"\x93NUMPY"
ORIENTATION_TAG = 0x0112
RESIZE_TEXTS = {
    "squash-box": "whole image squashed to a square by the box filter",
    "crop-adm": "halved by the box filter, bicubic to the size, centre crop",
    "exact": "none",
}


@dataclass(frozen=True)
class PixelRules:
    """Conversion of the values of an image to 8-bit intensities."""

    background: str = "white"
    """Color under transparent pixels, in Pillow's notation."""
    value_range: tuple[float, float] | None = None
    """Values of black and white in floats and 32-bit integers; None if not given."""
    orientation: bool = False
    """Whether the EXIF orientation is applied."""

    def to_uint8(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Convert an array of any dtype and shape to intensities 0 .. 255.

        16-bit integers are scaled by `value_range`, by default their full range. Raises
        AmbiguousIntensitiesError for dtypes other than uint8, uint16 and bool without `value_range`, and
        ImageDecodingError for values outside of it.
        """
        if values.dtype == np.uint8:
            return values
        if values.dtype == np.uint16 and self.value_range is None:
            return (values >> 8).astype(np.uint8)
        if values.dtype == np.bool_:
            return values.astype(np.uint8) * np.uint8(255)
        if values.dtype.kind not in "iuf":
            raise ImageDecodingError("no image")
        if self.value_range is None:
            raise AmbiguousIntensitiesError(f"{values.dtype}")
        low, high = self.value_range
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        if not bool(np.all((scaled >= -1e-3) & (scaled <= 255 + 1e-3))):  # false for NaN
            raise ImageDecodingError("values outside data.source.value_range")
        return np.rint(scaled).astype(np.uint8)

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """Convert to RGB, with EXIF orientation applied if `orientation`, and composed on the background."""
        image.load()
        kind = image.format
        if self.orientation:
            with suppress(Exception):  # damaged metadata does not affect the pixels
                if image.getexif().get(ORIENTATION_TAG, 1) != 1:
                    image = ImageOps.exif_transpose(image)
        if image.mode == "RGB" and "transparency" not in image.info:
            return image
        transparent = image.info.get("transparency")
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image)
            if image.mode.startswith("I;16") or kind in ("PNG", "PPM"):
                # Pillow would clip 16-bit values instead of scaling them; it reads PGM in mode I.
                bits = _tiff_bits(image)
                image = Image.fromarray(
                    self.to_uint8((values.astype(np.uint32) << (16 - bits)).astype(np.uint16))
                )
                if isinstance(transparent, int):
                    image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
            else:
                image = Image.fromarray(self.to_uint8(values))
        if not image.has_transparency_data:
            return image.convert("RGB")
        layer = image.convert("RGBA")
        below = Image.new("RGBA", layer.size, (*ImageColor.getrgb(self.background)[:3], 255))
        return Image.alpha_composite(below, layer).convert("RGB")


def decode(content: bytes, size: int, resize: str, rules: PixelRules = PixelRules()) -> NDArray[np.uint8]:
    """Decode an image file, or a .npy file, to uint8 [3, size, size]; all modes are converted to RGB.

    Raises ImageDecodingError, or its subclass AmbiguousIntensitiesError.
    """
    try:
        if content.startswith(NPY_MAGIC):
            return decode_array(np.load(io.BytesIO(content), allow_pickle=False), size, resize, rules)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about EXIF data and palettes do not affect the pixels
            image = Image.open(io.BytesIO(content))
            _check_size(image.size, size, resize)
            _refuse_pages(image)
            return _fit(rules.to_rgb(image), size, resize)
    except ImageDecodingError:
        raise
    except MemoryError:
        raise ImageDecodingError("too large") from None
    except Exception:  # Pillow raises many kinds of exceptions, struct.error among them
        raise ImageDecodingError("unreadable") from None


def decode_array(
    values: NDArray[Any], size: int, resize: str, rules: PixelRules = PixelRules()
) -> NDArray[np.uint8]:
    """Convert an image array to uint8 [3, size, size].

    It is [H, W], or has a first or last axis of 1 (gray), 2 (gray and alpha), 3 or 4 (alpha) channels,
    possibly after an axis of length 1. Without a value range, integers of other than 8 or 16 bits, which are
    common in parquet lists, must be 0 .. 255. Raises ImageDecodingError, or its subclass
    AmbiguousIntensitiesError.
    """
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and (values.shape[1:] == (size, size) or values.shape[-1] > 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] > 4):
        raise ImageDecodingError("no image")
    _check_size((values.shape[1], values.shape[0]), size, resize)
    if values.dtype.kind in "iu" and values.dtype != np.uint16 and rules.value_range is None:
        if values.size and (values.min() < 0 or values.max() > 255):
            raise ImageDecodingError("values outside 0 .. 255")
        values = values.astype(np.uint8)
    elif values.dtype == np.uint8 and rules.value_range is not None:
        values = values.astype(np.int32)  # value_range applies to 8-bit arrays, but not to 8-bit image files
    image = Image.fromarray(np.ascontiguousarray(rules.to_uint8(values)))
    return _fit(rules.to_rgb(image), size, resize)


def _refuse_pages(image: Image.Image) -> None:
    """Reject a TIFF with several images, such as a stack; smaller ones are thumbnails of the first."""
    if image.format != "TIFF" or not getattr(image, "is_animated", False):
        return
    first = image.size
    image.seek(1)
    second = image.size
    image.seek(0)
    if second == first:
        raise ImageDecodingError("several pages")


def _check_size(shape: tuple[int, int], size: int, resize: str) -> None:
    """Reject an image that would take too much memory, before its pixels are decoded."""
    if resize == "exact" and shape != (size, size):
        raise ImageDecodingError("another size")
    if min(shape) < 1:
        raise ImageDecodingError("empty")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ImageDecodingError("too large")
    if max(shape) > MAX_ASPECT * min(shape):
        raise ImageDecodingError("too narrow")


def _fit(image: Image.Image, size: int, resize: str) -> NDArray[np.uint8]:
    if resize == "squash-box":
        image = image.resize((size, size), Image.Resampling.BOX)
    elif resize == "crop-adm":
        image = _crop_adm(image, size)
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))


def _tiff_bits(image: Image.Image) -> int:
    """Bits per sample of a 16-bit image; a TIFF may have 12."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    return 12 if bits == (12,) else 16


def _crop_adm(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        half = (image.size[0] // 2, image.size[1] // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.size[0] * scale), round(image.size[1] * scale))
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return image.crop((left, top, left + size, top + size))
