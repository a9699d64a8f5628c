"""Galleries: images of a page, each at a size one can see.

Small images are enlarged by an integer factor, so that each of their pixels is a square. Importing
this module imports neither torch nor Pillow; `gallery_encoding` builds galleries from tensors.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SAMPLE_SIDE, STRIP_SIDE = 80, 48
"""Least width in pixels of a page of a sample, and of an image of a trajectory."""
SHEET_COLUMNS, SHEET_GAP, IMAGE_GAP = 8, 8, 2
"""Images per row of a sheet, at most unless a unit has more; pixels between units, and within them."""
LABEL_HEIGHT, LABEL_CHARACTER = 14, 7
"""Height of a label of a sheet, and about the width of a character, in pixels."""


@dataclass(frozen=True)
class Unit:
    """Images that are shown next to each other, with a label below."""

    name: str
    """Name of the images for screen readers."""
    uris: Sequence[str]
    """The images as data: URIs."""
    label: str = ""
    still: str = ""
    """For an animation: the image to show to readers who prefer no motion, as a data: URI."""


@dataclass(frozen=True)
class Gallery:
    """Images of equal sizes, with a caption."""

    units: Sequence[Unit]
    caption: str
    width: int
    """Displayed width of each image in pixels of a page."""
    height: int
    """Displayed height of each image."""
    enlarged: bool
    """Whether the images are displayed larger than they are, by an integer factor."""
    sequence: bool = False
    """Whether the images of a unit are a sequence in time, of which a narrow screen shows every second."""

    @property
    def layout(self) -> str:
        """Arrangement: units of more than two images as "rows", of two as "pairs"; empty for single ones."""
        images = max((len(unit.uris) for unit in self.units), default=1)
        return ("", "pairs", "rows")[min(images, 3) - 1]

    def sheet(self) -> bytes:
        """The gallery as one PNG with its labels; of an animation, its last frame."""
        from PIL import Image, ImageDraw, ImageFont

        rows = [[_opened(uri) for uri in ([unit.still] if unit.still else unit.uris)] for unit in self.units]
        band = LABEL_HEIGHT if any(unit.label for unit in self.units) else 0
        width = (self.width + IMAGE_GAP) * len(rows[0]) - IMAGE_GAP
        columns = min(len(rows), max(1, SHEET_COLUMNS // len(rows[0])))
        across, down = width + SHEET_GAP, self.height + band + SHEET_GAP
        size = (columns * across - SHEET_GAP, -(-len(rows) // columns) * down - SHEET_GAP)
        sheet = Image.new("RGB", size, "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
        method = Image.Resampling.NEAREST if self.enlarged else Image.Resampling.LANCZOS
        for number, (unit, images) in enumerate(zip(self.units, rows, strict=True)):
            left, top = number % columns * across, number // columns * down
            for column, image in enumerate(images):
                resized = image.convert("RGB").resize((self.width, self.height), method)
                sheet.paste(resized, (left + column * (self.width + IMAGE_GAP), top))
            # The font of an installation without FreeType has only these characters.
            label = unit.label.encode("latin-1", "replace").decode("latin-1")
            label = label[: max(1, width // LABEL_CHARACTER)]
            draw.text((left, top + self.height), label, fill="black", font=font)
        buffer = io.BytesIO()
        sheet.save(buffer, format="PNG")
        return buffer.getvalue()


def factor_for(side: int, least: int) -> int:
    """The smallest integer factor that enlarges an image of `side` pixels to at least `least`."""
    return max(1, -(-least // side))


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Encode bytes as a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _opened(uri: str) -> "Image.Image":
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
