"""Feature extractor based on a classifier of the data set, trained once and stored beside the data set."""

import json
import math
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fm_core.data.manifest import Manifest
from fm_core.data.reader import ImageReader, fair_order, has_fair_order
from fm_core.errors import UserError
from fm_core.evaluation.features.classifier import Classifier, accuracy, predict, train_classifier
from fm_core.evaluation.features.extractor import CLASSIFIER, Extractor
from fm_core.storage.hashing import fingerprint, sha256_bytes
from fm_core.storage.store import Store

RECIPE = {"classifier": 3, "seed": 0}
"""Version of the training recipe; increment it if the same data would yield another classifier."""

BATCH = 64
LEAST_STEPS = 500
EPOCHS = 8
"""Minimum number of passes over the training images."""
MAX_IMAGES = 200_000
"""Maximum number of training images, and of validation images, in memory."""
MAX_BYTES = 4 * 2**30
"""Maximum size of these images in memory, in bytes; enough for 200,000 RGB images of 84 x 84 pixels."""


def classifier_extractor(
    root: str, manifest: Manifest, device: torch.device, on_step: Callable[[int, int, float], None]
) -> Extractor:
    """Load the classifier stored beside a data set, or train it on the training split and store it.

    `on_step(step, steps, loss)` is called during training.

    Raises:
        UserError: the data set has no labels, or the stored weights do not match their record.
    """
    if not manifest.class_count:
        raise UserError(
            f"evaluate.features classifier: the data set {manifest.name} has no labels to train it on"
        )
    store = Store.at(root, manifest.name, "evaluation")
    recipe, selection = RECIPE["classifier"], _selection(manifest)
    name = f"classifier-{fingerprint([RECIPE, manifest.version, *selection])[:12]}"
    try:
        weights, record = (
            store.read_bytes(f"{name}.safetensors"),
            json.loads(store.read_bytes(f"{name}.json")),
        )
    except FileNotFoundError:
        weights, record = _train(root, manifest, device, on_step)
        store.write_bytes(f"{name}.safetensors", weights)
        store.write_bytes(f"{name}.json", json.dumps(record, indent=1).encode())
    if sha256_bytes(weights) != record["sha256"]:
        raise UserError(
            f"{store.url}/{name}.safetensors does not match the SHA-256 in {name}.json; remove both files to "
            "train the classifier again"
        )
    classifier = _untrained_classifier(manifest)
    classifier.load_state_dict(load(weights))
    classifier = classifier.to(device).eval()
    return Extractor(
        name=CLASSIFIER,
        sha256=record["sha256"],
        extract=lambda images: predict(classifier, images, manifest.levels),
        protocol={"classifier_recipe": ", ".join([str(recipe), *selection]) if selection else recipe},
        validation_accuracy=record["held_out_accuracy"],
        # Records of earlier versions do not have this key.
        validation_images=record.get("held_out_images", min(MAX_IMAGES, manifest.splits["val"].images)),
    )


def check_accuracy(extractor: Extractor, least: float | None, manifest: Manifest) -> None:
    """Check that a classifier recognizes validation images; otherwise distances on its features mean nothing.

    `least` is evaluate.classifier_min_accuracy; None stands for chance + (1 - chance) / 4.

    Raises:
        UserError: the accuracy is lower than `least`.
    """
    accuracy, classes = extractor.validation_accuracy, manifest.class_count or 1
    chance = 1 / classes
    limit = chance + (1 - chance) / 4 if least is None else least
    if least is None and extractor.validation_images:
        # The accuracy on few images is uncertain: the default refuses only what lies below by two errors.
        limit -= 2 * (limit * (1 - limit) / extractor.validation_images) ** 0.5
    if accuracy is not None and accuracy < limit:
        raise UserError(
            f"evaluate.features classifier: accuracy on {extractor.validation_images:,} validation images of "
            f"{manifest.name} is {accuracy:.1%}, below evaluate.classifier_min_accuracy {limit:.1%} "
            f"({classes} classes): name other features, e.g. evaluate.features inception, or lower this key"
        )


def training_steps(images: int) -> int:
    """Optimizer steps of the classifier: 500, or the steps of `EPOCHS` passes over its images if more."""
    return max(LEAST_STEPS, math.ceil(EPOCHS * min(images, MAX_IMAGES) / BATCH))


def _selection(manifest: Manifest) -> list[str]:
    """Differences from the training of earlier versions, which took 500 steps on the first MAX_IMAGES by id.

    Empty if there are none, so that the classifiers of earlier versions are reused.
    """
    images = manifest.splits["train"].images
    limit = MAX_BYTES // prod(manifest.image_shape)
    selection = [f"at most {limit} images"] if limit < min(MAX_IMAGES, images) else []
    if min(MAX_IMAGES, limit) < images and not has_fair_order(manifest, "train"):
        selection.append("in fair order")
    if (steps := training_steps(min(images, limit))) > LEAST_STEPS:
        selection.append(f"{steps} steps")
    return selection


def first_images(root: str, manifest: Manifest, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Read a representative sample of at most `count` images of a split, and their labels.

    Returns uint8 [n, C, S, S] and int64 [n] (-1 if unlabeled); the images take at most MAX_BYTES.
    """
    count = min(count, MAX_BYTES // prod(manifest.image_shape))
    with ImageReader(root, manifest, split) as reader:
        return reader.read(fair_order(manifest, split)[:count])


def _train(
    root: str, manifest: Manifest, device: torch.device, on_step: Callable[[int, int, float], None]
) -> tuple[bytes, dict[str, Any]]:
    images, labels = first_images(root, manifest, "train", MAX_IMAGES)
    classes, seed = manifest.class_count or 0, RECIPE["seed"]
    steps = training_steps(len(images))
    classifier = train_classifier(
        images, labels, manifest.levels, classes, seed, steps, BATCH, device=device, on_progress=on_step
    )
    validation, validation_labels = first_images(root, manifest, "val", MAX_IMAGES)
    scores = {
        "held_out_accuracy": accuracy(classifier, validation, validation_labels, manifest.levels),
        "held_out_images": len(validation),
    }
    weights = save({name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()})
    record = {"schema": 1, "sha256": sha256_bytes(weights), **scores, "recipe": RECIPE}
    return weights, record


def _untrained_classifier(manifest: Manifest) -> Classifier:
    channels, side, _ = manifest.image_shape
    return Classifier(channels, side, manifest.class_count or 0)
