"""Kinds of pictures and arrays: which pixels come out of each, or why it is refused."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
from PIL import Image

from tests.support.source_cases import encode, parquet

WHITE = (255, 255, 255)
Color = tuple[int, int, int]


@dataclass(frozen=True)
class PixelCase:
    """A picture whose upper half is of one color and whose lower half of another; 8 x 8 in the data set."""

    name: str
    content: bytes
    upper: Color | None = None
    lower: Color | None = None
    ending: str = "png"
    rejected: str | None = None
    refused: str | None = None
    left: Color | None = None
    """Color of the left half, instead of upper and lower."""
    source: dict[str, Any] = field(default_factory=dict)


def halves(upper: Any, lower: Any, dtype: Any = np.uint8) -> np.ndarray:
    """[8, 8] or [8, 8, channels]."""
    array = np.empty((8, 8, *np.shape(upper)), dtype)
    array[:4], array[4:] = upper, lower
    return array


def array_file(array: np.ndarray, dtype: Any = None) -> bytes:
    """A parquet file with three rows of the array as nested lists."""
    kind: Any = pyarrow.from_numpy_dtype(dtype or array.dtype)
    for _ in array.shape:
        kind = pyarrow.list_(kind)
    return parquet([], [0, 0, 0], column=pyarrow.array([array.tolist()] * 3, kind))


def array_case(name: str, array: np.ndarray, *colors: Color | None, **options: Any) -> PixelCase:
    source = {"format": "parquet"} | options.pop("source", {})
    return PixelCase(name, array_file(array), *colors, ending="parquet", source=source, **options)


def image(array: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    return encode(Image.fromarray(array), kind, **options)


def turned(orientation: int, kind: str) -> bytes:
    """White in the upper half as it is stored, black in the lower, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image(halves(WHITE, (0, 0, 0)), kind, exif=exif)


def palette(transparent: int | bytes, kind: str = "png") -> bytes:
    picture = Image.fromarray(halves(0, 1), "P")
    picture.putpalette([200, 0, 0, 0, 0, 200])
    return encode(picture, kind, transparency=transparent)


def pgm(array: np.ndarray, largest: int) -> bytes:
    return b"P5 8 8 %d\n" % largest + array.astype(">u2").tobytes()


def pages(kind: str, second: tuple[int, int]) -> bytes:
    """A white picture and a black one of another size."""
    return encode(
        Image.new("RGB", (8, 8), WHITE), kind, save_all=True, append_images=[Image.new("RGB", second)]
    )


def wide(width: int, height: int) -> bytes:
    return encode(Image.new("1", (width, height)))


def claiming(width: int, height: int) -> bytes:
    """A small PNG that claims a size."""
    content = bytearray(encode(Image.new("L", (8, 8))))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
HIDDEN = np.concatenate([NOISE[..., :3], np.zeros((8, 8, 1), np.uint8)], axis=2)
RANGE = {"value_range": [0, 1]}
SIGNED = {"value_range": [-1, 1]}
GRAY: Sequence[Color] = [(n, n, n) for n in range(256)]

CASES = [
    PixelCase("RGB", image(halves((9, 8, 7), (1, 2, 3))), (9, 8, 7), (1, 2, 3)),
    PixelCase("gray", image(halves(9, 200)), GRAY[9], GRAY[200]),
    PixelCase("one bit", encode(Image.fromarray(halves(0, 255)).convert("1")), GRAY[0], GRAY[255]),
    PixelCase(
        "palette",
        encode(Image.fromarray(halves((200, 0, 0), (0, 0, 200))).quantize(4)),
        (200, 0, 0),
        (0, 0, 200),
    ),
    PixelCase("CMYK", encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "tiff"), WHITE, WHITE, ending="tif"),
    PixelCase("transparent everywhere", image(HIDDEN), WHITE, WHITE),
    PixelCase("transparent on black", image(HIDDEN), GRAY[0], GRAY[0], source={"background": "black"}),
    PixelCase(
        "transparent on a color", image(HIDDEN), (18, 52, 86), (18, 52, 86), source={"background": "#123456"}
    ),
    PixelCase("half transparent", image(halves((0, 0, 0, 255), (100, 0, 0, 0))), GRAY[0], WHITE),
    PixelCase("a fifth opaque", image(halves((0, 0, 0, 51), (0, 0, 0, 51))), GRAY[204], GRAY[204]),
    PixelCase("gray with alpha", image(halves((50, 255), (50, 0))), GRAY[50], WHITE),
    PixelCase("palette with a transparent color", palette(1), (200, 0, 0), WHITE),
    PixelCase("palette with an alpha for each color", palette(bytes([0, 255])), WHITE, (0, 0, 200)),
    PixelCase(
        "gray with a transparent level", encode(Image.fromarray(halves(7, 9)), transparency=7), WHITE, GRAY[9]
    ),
    PixelCase(
        "RGB with a transparent color",
        encode(Image.fromarray(halves((1, 2, 3), (4, 5, 6))), transparency=(1, 2, 3)),
        WHITE,
        (4, 5, 6),
    ),
    PixelCase("transparent GIF", palette(1, "gif"), (200, 0, 0), WHITE, ending="gif"),
    PixelCase(
        "transparent WebP", image(HIDDEN, "webp", lossless=True, exact=True), WHITE, WHITE, ending="webp"
    ),
    PixelCase("16 bits", image(halves(257 * 9, 65535, np.uint16)), GRAY[9], WHITE),
    PixelCase("16 bits, dark", image(halves(0, 512, np.uint16)), GRAY[0], GRAY[2]),
    PixelCase("16 bits of 9", image(halves(0, 500, np.uint16)), refused="only intensities 0 and 1 of 255"),
    PixelCase(
        "16 bits in TIFF", image(halves(257 * 9, 65535, np.uint16), "tiff"), GRAY[9], WHITE, ending="tif"
    ),
    PixelCase("16 bits in PGM", pgm(halves(257 * 9, 65535, np.uint16), 65535), GRAY[9], WHITE, ending="pgm"),
    PixelCase("8 bits in PGM", b"P5 8 8 255\n" + halves(3, 4).tobytes(), GRAY[3], GRAY[4], ending="pgm"),
    PixelCase(
        "32-bit integers",
        image(halves(0, 70000, np.int32), "tiff"),
        ending="tif",
        refused=r"values are int32, not uint8 or uint16; set data\.source\.value_range",
    ),
    PixelCase(
        "32-bit integers with a range",
        image(halves(0, 70000, np.int32), "tiff"),
        GRAY[0],
        WHITE,
        ending="tif",
        source={"value_range": [0, 70000]},
    ),
    PixelCase("floats", image(halves(0, 1, np.float32), "tiff"), ending="tif", refused="values are float32"),
    PixelCase(
        "floats with a range",
        image(halves(0.2, 1, np.float32), "tiff"),
        GRAY[51],
        WHITE,
        ending="tif",
        source=RANGE,
    ),
    PixelCase(
        "floats with a signed range",
        image(halves(-1, 0.2, np.float32), "tiff"),
        GRAY[0],
        GRAY[153],
        ending="tif",
        source=SIGNED,
    ),
    PixelCase(
        "floats outside of their range",
        image(halves(0, 1.5, np.float32), "tiff"),
        ending="tif",
        source=RANGE,
        rejected="values outside data.source.value_range",
    ),
    PixelCase(
        "floats that are none",
        image(halves(0, np.nan, np.float32), "tiff"),
        ending="tif",
        source=RANGE,
        rejected="values outside data.source.value_range",
    ),
    PixelCase("turned JPEG", turned(6, "jpeg"), left=GRAY[0], ending="jpg"),
    PixelCase("turned PNG", turned(6, "png"), left=GRAY[0]),
    PixelCase("turned the other way", turned(8, "jpeg"), left=WHITE, ending="jpg"),
    PixelCase("upside down", turned(3, "jpeg"), GRAY[0], WHITE, ending="jpg"),
    PixelCase("upright", turned(1, "jpeg"), WHITE, GRAY[0], ending="jpg"),
    PixelCase("AVIF", image(halves(WHITE, WHITE), "avif"), WHITE, WHITE, ending="avif"),
    PixelCase(
        "JPEG 2000", image(halves((9, 8, 7), (1, 2, 3)), "jpeg2000"), (9, 8, 7), (1, 2, 3), ending="jp2"
    ),
    PixelCase("another size", encode(Image.new("RGB", (9, 8))), rejected="another size"),
    PixelCase("too narrow to crop", wide(1, 60_000), rejected="too narrow", source={"resize": "crop-adm"}),
    PixelCase(
        "too narrow to squash", wide(60_000, 1), rejected="too narrow", source={"resize": "squash-box"}
    ),
    PixelCase("too large", claiming(40_000, 40_000), rejected="too large", source={"resize": "squash-box"}),
    PixelCase("truncated", image(NOISE)[:150], rejected="unreadable"),
    PixelCase("a page of HTML", b"<html>not found</html>", rejected="unreadable"),
    PixelCase("empty", b"", rejected="unreadable"),
    array_case("array, channels last", halves((9, 8, 7), (1, 2, 3)), (9, 8, 7), (1, 2, 3)),
    array_case(
        "array, channels first", halves((9, 8, 7), (1, 2, 3)).transpose(2, 0, 1), (9, 8, 7), (1, 2, 3)
    ),
    array_case("array without channels", halves(9, 200), GRAY[9], GRAY[200]),
    array_case("array of one channel", halves(9, 200)[..., None], GRAY[9], GRAY[200]),
    array_case("array of one channel, first", halves(9, 200)[None], GRAY[9], GRAY[200]),
    array_case("array with alpha", halves((1, 2, 3, 255), (1, 2, 3, 0)), (1, 2, 3), WHITE),
    array_case("array of 16 bits", halves(257 * 9, 65535, np.uint16), GRAY[9], WHITE),
    array_case("array of floats", halves(0, 1, np.float32), refused=r"0\.parquet: image: values are float32"),
    array_case("array of doubles", halves((0, 0, 0), (1, 1, 1), np.float64), refused="values are float64"),
    array_case("array of floats with a range", halves(-1.0, 1.0, np.float32), GRAY[0], WHITE, source=SIGNED),
    array_case(
        "array of floats outside of it",
        halves(-1.0, 1.0, np.float32),
        source=RANGE,
        rejected="values outside data.source.value_range",
    ),
    array_case("array of 32-bit integers", halves(0, 255, np.int32), GRAY[0], WHITE),
    array_case("array of long integers", halves(9, 200, np.int64), GRAY[9], GRAY[200]),
    array_case("array of large integers", halves(0, 256, np.int64), rejected="values outside 0 .. 255"),
    array_case("array of negative integers", halves(-1, 255, np.int16), rejected="values outside 0 .. 255"),
    array_case(
        "array of integers with a range",
        halves(0, 255, np.int64),
        GRAY[0],
        WHITE,
        source={"value_range": [0, 255]},
    ),
    array_case("array of another size", np.zeros((9, 9, 3), np.uint8), rejected="another size"),
    array_case(
        "array of another size, squashed",
        np.full((9, 9, 3), 5, np.uint8),
        GRAY[5],
        GRAY[5],
        source={"resize": "squash-box"},
    ),
    array_case("array without a picture", np.zeros(8, np.uint8), rejected="no image"),
    array_case(
        "array of one image", halves((9, 8, 7), (1, 2, 3)).transpose(2, 0, 1)[None], (9, 8, 7), (1, 2, 3)
    ),
    array_case("array of two images", np.zeros((2, 3, 8, 8), np.uint8), rejected="no image"),
    array_case("array of bits", halves(False, True, bool), GRAY[0], WHITE),
    array_case("array of bits in bytes", halves(0, 1), refused="0 and 1 of 255; multiply them"),
    array_case("array of bits in bytes with a range", halves(0, 1), GRAY[0], WHITE, source=RANGE),
    array_case("array of half floats", halves(0, 1, np.float16), refused="values are float16"),
    array_case(
        "array of bytes outside of the range",
        halves(0, 255),
        source=RANGE,
        rejected="values outside data.source",
    ),
    array_case(
        "array of 12 bits", halves(0, 4095, np.uint16), GRAY[0], WHITE, source={"value_range": [0, 4095]}
    ),
    PixelCase(
        "12 bits in a picture",
        image(halves(0, 4095, np.uint16)),
        GRAY[0],
        WHITE,
        source={"value_range": [0, 4095]},
    ),
    PixelCase("8 bits beside floats", image(halves(0, 255)), GRAY[0], WHITE, source=RANGE),
    PixelCase("a picture of bits in bytes", image(halves(0, 1)), refused="0 and 1 of 255"),
    PixelCase("all black", image(halves(0, 0)), GRAY[0], GRAY[0]),
    PixelCase("a stack of pages", pages("tiff", (8, 8)), ending="tif", rejected="several pages"),
    PixelCase("a page and its thumbnail", pages("tiff", (4, 4)), WHITE, WHITE, ending="tif"),
    PixelCase("the first frame of a GIF", pages("gif", (8, 8)), WHITE, WHITE, ending="gif"),
    PixelCase("turned TIFF", turned(6, "tiff"), left=GRAY[0], ending="tif"),
    PixelCase("turned WebP", turned(6, "webp"), left=GRAY[0], ending="webp"),
]
