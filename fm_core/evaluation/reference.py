"""Moments of the training images, computed once from the shards and kept beside the data set."""

from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load, save

from fm_core.data.manifest import Manifest
from fm_core.data.reader import ImageReader
from fm_core.data.store import Store
from fm_core.evaluation.extractor import Extractor
from fm_core.evaluation.frechet import Moments
from fm_core.run.directory import fingerprint

BLOCK_IMAGES = 4096


def reference_moments(
    root: str, manifest: Manifest, extractor: Extractor, on_images: Callable[[int], None]
) -> Moments:
    """Moments of the features of all training images; `on_images` hears how many are finished."""
    store = Store.at(root, manifest.name, "evaluation")
    name = f"train-{fingerprint([manifest.version, extractor.sha256])[:12]}.safetensors"
    try:
        kept = load(store.read_bytes(name))
        return Moments(int(kept["count"]), kept["total"], kept["products"])
    except FileNotFoundError:
        moments = _compute(ImageReader(root, manifest, "train"), extractor, on_images)
    parts = {"count": torch.tensor(moments.count), "total": moments.total, "products": moments.products}
    store.write_bytes(name, save(parts))
    return moments


def _compute(reader: ImageReader, extractor: Extractor, on_images: Callable[[int], None]) -> Moments:
    whole: Moments | None = None
    for first in range(0, len(reader), BLOCK_IMAGES):
        last = min(first + BLOCK_IMAGES, len(reader))
        images, _ = reader.read(np.arange(first, last, dtype=np.int64))
        part = Moments.of(extractor(images)[0])
        whole = part if whole is None else whole + part
        on_images(last)
    if whole is None:
        raise ValueError("the training split is empty")
    return whole
