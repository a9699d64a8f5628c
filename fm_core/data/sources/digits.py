"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels with 17 intensity levels."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Input, Interpretation
from fm_core.data.sources.base import ArrayStream, Classes, SourceFacts, SourcePart
from fm_core.data.sources.splits import split_validation
from fm_core.errors import UserError
from fm_core.storage.hashing import sha256_bytes

DIGITS_IMAGES = 1797


class DigitsSource:
    """The digits, split by a seeded permutation into training and validation."""

    def __init__(self, config: DataSection) -> None:
        if config.validation_images >= DIGITS_IMAGES:
            raise UserError(
                f"data.validation_images: {config.validation_images} leaves nothing to train on; "
                f"there are {DIGITS_IMAGES} digits"
            )
        self._validation_images = config.validation_images
        self._seed = config.split_seed
        self.facts = SourceFacts(
            levels=17,
            image_shape=(1, 8, 8),
            recipe={
                "source": "digits",
                "validation_images": config.validation_images,
                "split_seed": config.split_seed,
            },
            images=DIGITS_IMAGES,
        )

    def classes(self) -> Classes:
        """The ten digits."""
        return Classes(10, "digits", tuple("0123456789"))

    def interpretation(self) -> Interpretation:
        """The seeded split."""
        return Interpretation(
            splits=f"val: {self._validation_images:,} of {DIGITS_IMAGES:,}, chosen by data.split_seed",
            classes="10: the digits",
            pixels="17 intensity levels, one channel",
            order="by the numbers of scikit-learn",
            fair_order=True,
        )

    def parts(self) -> tuple[SourcePart, ...]:
        """One part for each split."""
        return (
            SourcePart("digits-train", "train", DIGITS_IMAGES - self._validation_images),
            SourcePart("digits-val", "val", self._validation_images),
        )

    def inputs(self) -> tuple[Input, ...]:
        """The arrays of scikit-learn."""
        images, labels = _load()
        digest = sha256_bytes(images.tobytes() + labels.tobytes())
        return (Input(name="sklearn.datasets.load_digits", bytes=images.nbytes, digest=f"sha256:{digest}"),)

    def state(self) -> str:
        """Empty, because the digits do not change."""
        return ""

    def check_labels(self) -> None:
        """Do nothing: the labels are scikit-learn's."""

    def open(self, part: SourcePart) -> ArrayStream:
        """The images of one split, in scikit-learn's order."""
        images, labels = _load()
        train, validation = split_validation(DIGITS_IMAGES, self._validation_images, self._seed)
        selected = validation if part.split == "val" else train
        return ArrayStream(images[selected], labels[selected])

    def release(self) -> None:
        """Does nothing."""


def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # imported here, because it takes a second

    bunch = cast(Any, load_digits())
    images = np.asarray(bunch.images, np.float64)
    if images.shape != (DIGITS_IMAGES, 8, 8) or images.min() < 0 or images.max() > 16:
        raise UserError(f"scikit-learn's digits have the shape {images.shape}, not ({DIGITS_IMAGES}, 8, 8)")
    return images.astype(np.uint8)[:, None], np.asarray(bunch.target, np.int64)
