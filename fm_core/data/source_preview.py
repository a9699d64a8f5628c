"""Preview of a source before anything is written: splits, classes, counts, and some images."""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fm_core.config.data import DataSection
from fm_core.data.shard_plan import ShardPlan, check_plan, make_plan
from fm_core.data.sources.base import Classes

SHOWN_CLASSES = 16
READ_IMAGES = 64
MOST_IMAGES = 1024
"""Largest number of images to read in search of one of each class."""
TILE = 96
COLUMNS = 8


@dataclass(frozen=True)
class SourcePreview:
    """Summary of a source, and the first training image of some classes."""

    plan: ShardPlan
    """The shards that would be written."""
    images: NDArray[np.uint8]
    """First image of each of some classes, or the first images without labels; uint8 [n, C, H, W]."""
    names: tuple[str, ...]
    """Class of each of these images; "" without labels."""

    def counts(self) -> dict[str, int]:
        """Number of images of each split, including unreadable ones."""
        counts: dict[str, int] = {}
        for task in self.plan.tasks:
            counts[task.split] = counts.get(task.split, 0) + task.rows
        return counts

    def lines(self) -> list[str]:
        """The preview as lines of text."""
        facts = self.plan.source.facts
        counts = " + ".join(f"{count:,} {split}" for split, count in self.counts().items())
        channels, height, width = facts.image_shape
        size = f"{height} x {width} pixels, {channels} channels, {facts.levels} intensity levels"
        return [
            f"format: {facts.recipe['source']}",
            f"images: {counts} ({size})",
            *self.plan.interpretation.lines(),
            f"shards: {len(self.plan.tasks)}, about {self.plan.bytes / 1e6:,.1f} MB",
        ]


def preview_source(config: DataSection) -> SourcePreview:
    """Plan the shards of a configuration and read a few images; nothing is written to the data set.

    Raises UserError if the source is missing or wrong.
    """
    plan = make_plan(config)
    try:
        check_plan(plan)
        images, names = _first_of_classes(plan)
    finally:
        plan.source.release()
    return SourcePreview(plan, images, names)


def _first_of_classes(plan: ShardPlan) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """The first training image of up to SHOWN_CLASSES classes that occur among the first images."""
    wanted = min(plan.classes.count or SHOWN_CLASSES, SHOWN_CLASSES)
    examples: dict[int, NDArray[np.uint8]] = {}
    part = next(task.part for task in plan.tasks)
    stream = plan.source.open(part)
    try:
        for first in range(0, min(part.rows, MOST_IMAGES), READ_IMAGES):
            samples = stream.read(min(READ_IMAGES, part.rows - first))
            for row, image in enumerate(samples.images):
                label = len(examples) if samples.labels is None else int(samples.labels[row])
                if len(examples) < wanted:
                    examples.setdefault(label, image)
            if len(examples) >= wanted:
                break
    finally:
        stream.close()
    in_order = sorted(examples)
    shape = (len(examples), *plan.source.facts.image_shape)
    images = np.array([examples[label] for label in in_order], np.uint8).reshape(shape)
    return images, tuple(_name(plan.classes, label) for label in in_order)


def _name(classes: Classes, label: int) -> str:
    if classes.count is None:
        return ""
    return classes.names[label] if classes.names else str(label)


def contact_sheet(preview: SourcePreview) -> Image.Image:
    """The images of a preview in a row, each above the name of its class."""
    count, line = max(1, len(preview.images)), 14
    columns = min(COLUMNS, count)
    sheet = Image.new("RGB", (columns * (TILE + 8), ceil(count / columns) * (TILE + line + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    levels = preview.plan.source.facts.levels
    for number, (image, name) in enumerate(zip(preview.images, preview.names, strict=True)):
        pixels = (image.astype(np.uint16) * 255 // (levels - 1)).astype(np.uint8).transpose(1, 2, 0)
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
        left, top = number % columns * (TILE + 8) + 4, number // columns * (TILE + line + 8) + 4
        sheet.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + TILE), name.encode("latin-1", "replace").decode("latin-1")[:16], fill="black")
    return sheet
