"""Image grids, strips and animations, and the nearest training image of each sample."""

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

NEAREST_BLOCK = 4096
"""Number of training images that are compared at a time."""
LONGEST_NAME, NAME_PADDING = 24, 4
"""Maximum number of characters in a row's name, and pixels of padding beside it."""
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 120, 1_500


def grid(images: Tensor, levels: int, columns: int, scale: int = 4, line: int = 1) -> Image.Image:
    """Arrange images uint8 [n, C, H, W] of `levels` intensity levels row by row, enlarged `scale` times.

    A black line, `line` image pixels wide, separates each image from the images to its right and below it.
    """
    images = torch.nn.functional.pad(images, (0, line, 0, line))
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.zeros(rows * columns, channels, height, width, dtype=torch.uint8)
    sheet[:count] = (images.float() * (255 / (levels - 1))).round().to(torch.uint8)
    array = (
        sheet.view(rows, columns, channels, height, width)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * height, columns * width, channels)
        .numpy()
    )
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def name_rows(sheet: Image.Image, names: Sequence[str]) -> Image.Image:
    """Add a left margin to a grid with the name of each of its rows, which have equal heights.

    Names are truncated to 24 characters.
    """
    font = ImageFont.load_default()
    # The font of an installation without FreeType has only these characters.
    shown = [name.encode("latin-1", "replace").decode("latin-1")[:LONGEST_NAME] for name in names]
    boxes = [font.getbbox(name) for name in shown]
    margin = int(max(box[2] for box in boxes)) + 2 * NAME_PADDING
    named = Image.new(sheet.mode, (sheet.width + margin, sheet.height))
    named.paste(sheet, (margin, 0))
    draw, height = ImageDraw.Draw(named), sheet.height // len(names)
    for row, (name, box) in enumerate(zip(shown, boxes, strict=True)):
        top = row * height + (height - box[1] - box[3]) / 2
        draw.text((NAME_PADDING, top), name, fill="white", font=font)
    return named


def strip(trajectory: Tensor, levels: int, columns: int, scale: int = 4) -> Image.Image:
    """Draw the trajectory of each image from noise (left) to data (right), one per row.

    `trajectory` is uint8 [T, n, C, H, W]; `columns` of its T times are shown, including the first and the
    last.
    """
    times = torch.linspace(0, len(trajectory) - 1, columns).round().long()
    return grid(trajectory[times].transpose(0, 1).flatten(0, 1), levels, columns, scale)


def animation(trajectory: Tensor, levels: int, columns: int, scale: int = 4, line: int = 1) -> bytes:
    """Animate trajectories from noise to data, uint8 [T, n, C, H, W], as a PNG that pauses at the end.

    `line` is the width of the lines between images, as in `grid`.
    """
    first, *frames = [grid(images, levels, columns, scale, line) for images in trajectory]
    buffer = io.BytesIO()
    pause = [FRAME_MILLISECONDS] * len(frames) + [LAST_FRAME_MILLISECONDS]
    first.save(buffer, format="PNG", save_all=True, append_images=frames, duration=pause, loop=0)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """Encode an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def nearest(samples: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest training image of each sample uint8 [n, C, H, W]: its index and its distance.

    Returns int64 [n] and float64 [n]. Distances are root mean squares over pixels, in intensity levels.
    """
    a = samples.flatten(1).double()
    least = torch.full((len(a),), torch.inf, dtype=torch.float64)
    ids = torch.zeros(len(a), dtype=torch.int64)
    for number, block in enumerate(training.split(NEAREST_BLOCK)):
        b = block.flatten(1).double()
        squares = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
        best = squares.clamp_min(0).min(1)
        closer = best.values < least
        ids = torch.where(closer, best.indices + number * NEAREST_BLOCK, ids)
        least = torch.where(closer, best.values, least)
    return ids, (least / a.shape[1]).sqrt()
