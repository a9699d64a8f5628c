"""The classifier of a data set, trained once and kept beside it."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fm_core.data.manifest import Manifest
from fm_core.data.reader import ImageReader
from fm_core.errors import UserError
from fm_core.evaluation.features.classifier import Classifier, accuracy, read, train_classifier
from fm_core.evaluation.features.extractor import CLASSIFIER, Extractor
from fm_core.storage.hashing import fingerprint
from fm_core.storage.store import Store

RECIPE = {"classifier": 3, "seed": 0}
"""Changes whenever the same data would give another classifier."""

MOST_IMAGES = 200_000
"""Training images and held-out images that are held in memory, at most."""


def data_set_extractor(
    root: str, manifest: Manifest, device: torch.device, on_step: Callable[[int, int, float], None]
) -> Extractor:
    """Load the classifier kept beside a data set, or train it on the training images and keep it.

    `on_step` hears (step, steps, loss) while it trains. UserError for a data set without labels.
    """
    if not manifest.class_count:
        raise UserError(
            f"evaluate.features classifier: the data set {manifest.name} has no labels to train it on"
        )
    store = Store.at(root, manifest.name, "evaluation")
    name = f"classifier-{fingerprint([RECIPE, manifest.version])[:12]}"
    try:
        weights, record = (
            store.read_bytes(f"{name}.safetensors"),
            json.loads(store.read_bytes(f"{name}.json")),
        )
    except FileNotFoundError:
        weights, record = _train(root, manifest, device, on_step)
        store.write_bytes(f"{name}.safetensors", weights)
        store.write_bytes(f"{name}.json", json.dumps(record, indent=1).encode())
    if hashlib.sha256(weights).hexdigest() != record["sha256"]:
        raise UserError(
            f"{store.url}/{name}.safetensors differs from its record; remove both files to train it again"
        )
    classifier = _classifier(manifest)
    classifier.load_state_dict(load(weights))
    classifier = classifier.to(device).eval()
    return Extractor(
        name=CLASSIFIER,
        sha256=record["sha256"],
        read=lambda images: read(classifier, images, manifest.levels),
        protocol={"classifier_recipe": RECIPE["classifier"]},
        held_out_accuracy=record["held_out_accuracy"],
        # Records of before this was told.
        held_out_images=record.get("held_out_images", min(MOST_IMAGES, manifest.splits["val"].images)),
    )


def first_images(root: str, manifest: Manifest, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a split and their labels: uint8 [n, C, S, S], int64 [n] (-1 without labels)."""
    reader = ImageReader(root, manifest, split)
    return reader.read(np.arange(min(count, len(reader)), dtype=np.int64))


def _train(
    root: str, manifest: Manifest, device: torch.device, on_step: Callable[[int, int, float], None]
) -> tuple[bytes, dict[str, Any]]:
    images, labels = first_images(root, manifest, "train", MOST_IMAGES)
    classes, seed = manifest.class_count or 0, RECIPE["seed"]
    classifier = train_classifier(
        images, labels, manifest.levels, classes, seed, device=device, on_progress=on_step
    )
    real, classes_of_real = first_images(root, manifest, "val", MOST_IMAGES)
    held_out = {
        "held_out_accuracy": accuracy(classifier, real, classes_of_real, manifest.levels),
        "held_out_images": len(real),
    }
    weights = save({name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()})
    facts = {"sha256": hashlib.sha256(weights).hexdigest(), **held_out, "recipe": RECIPE}
    return weights, {"schema": 1, **facts}


def _classifier(manifest: Manifest) -> Classifier:
    channels, side, _ = manifest.image_shape
    return Classifier(channels, side, manifest.class_count or 0)
