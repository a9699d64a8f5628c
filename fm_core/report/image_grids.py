"""Pictures: grids of images, curves of loss and distance."""

import base64
import io
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAREST_BLOCK = 4096
"""Training images that are compared at a time."""
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 120, 1_500


def grid(images: Tensor, levels: int, columns: int, scale: int = 4) -> Image.Image:
    """A picture of images uint8 [n, C, H, W] of `levels` grey levels, row by row, `scale` pixels for one.

    A black line of one image pixel stands right of and below each image.
    """
    images = torch.nn.functional.pad(images, (0, 1, 0, 1))
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
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def strip(trajectory: Tensor, levels: int, columns: int, scale: int = 4) -> Image.Image:
    """A picture of the way of each image from noise (left) to data (right), a row each.

    `trajectory` is uint8 [T, n, C, H, W]; `columns` of its T times are shown, the first and last among them.
    """
    times = torch.linspace(0, len(trajectory) - 1, columns).round().long()
    return grid(trajectory[times].transpose(0, 1).flatten(0, 1), levels, columns, scale)


def animation(trajectory: Tensor, levels: int, columns: int, scale: int = 4) -> bytes:
    """An animated PNG of images on their way from noise, uint8 [T, n, C, H, W]; it ends on the last."""
    first, *frames = [grid(images, levels, columns, scale) for images in trajectory]
    buffer = io.BytesIO()
    pause = [FRAME_MILLISECONDS] * len(frames) + [LAST_FRAME_MILLISECONDS]
    first.save(buffer, format="PNG", save_all=True, append_images=frames, duration=pause, loop=0)
    return buffer.getvalue()


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Bytes as a URI that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def loss_curve(metrics: list[dict[str, Any]]) -> bytes:
    """PNG of the training loss, whole and by quarter of t, against images seen.

    `metrics` are the lines of train/metrics.jsonl; at least one.
    """
    figure, axes = _against_images_seen("loss per dimension")
    seen = [line["images_seen"] for line in metrics]
    for quarter in range(4):
        values = [line["loss_by_quarter_of_t"][quarter] for line in metrics]
        axes.plot(seen, values, linewidth=0.9, alpha=0.6, label=f"t in quarter {quarter + 1}")
    axes.plot(seen, [line["loss"] for line in metrics], color="black", linewidth=1.6, label="all t")
    axes.legend(fontsize=7, ncols=5, loc="upper right")
    return _drawn(figure)


def distance_curve(scores: list[dict[str, Any]]) -> bytes:
    """PNG of the distance with its standard error against images seen.

    `scores` are the lines of evaluation/beside.jsonl; at least one.
    """
    figure, axes = _against_images_seen(f"Fréchet distance ({scores[-1]['features']} features)")
    seen = [line["images_seen"] for line in scores]
    distances = [line["frechet_distance"] for line in scores]
    axes.errorbar(seen, distances, [line["stderr"] for line in scores], color="black", marker="o", capsize=3)
    return _drawn(figure)


def _against_images_seen(what: str) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("images seen")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    return figure, axes


def _drawn(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def nearest(samples: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample uint8 [n, C, H, W] the id of the nearest training image and the distance to it.

    Distances are root mean squares over pixels, in grey levels; results int64 [n], float64 [n].
    """
    a = samples.flatten(1).double()
    least = torch.full((len(a),), torch.inf, dtype=torch.float64)
    ids = torch.zeros(len(a), dtype=torch.int64)
    for number, block in enumerate(training.split(NEAREST_BLOCK)):
        b = block.flatten(1).double()
        squares = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
        best = squares.clamp_min(0).min(1)
        nearer = best.values < least
        ids = torch.where(nearer, best.indices + number * NEAREST_BLOCK, ids)
        least = torch.where(nearer, best.values, least)
    return ids, (least / a.shape[1]).sqrt()
