"""Selection of the splits of a source for training and validation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fm_core.data.sources.splits import permutation, split_validation
from fm_core.errors import UserError

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class SplitChoice:
    """The selected splits, by their names in the source; None stands for images in no split."""

    train: str | None
    """Split of the training images."""
    validation: str | None
    """Split of the validation images; the same as `train` if they are chosen from it at random."""
    left_alone: tuple[str | None, ...]
    """Splits that are not used."""

    @property
    def own_validation(self) -> bool:
        """Whether the source has a validation split."""
        return self.validation != self.train

    @property
    def used(self) -> tuple[str | None, ...]:
        """The splits that are used, train first."""
        return tuple(dict.fromkeys((self.train, self.validation)))


def choose_splits(
    splits: Sequence[str | None], url: str, usable: Callable[[str], bool] = lambda split: True
) -> SplitChoice:
    """Choose among train, val, test and None (in no split).

    Validation is preferred to test, which is never trained on; test is used for validation if there is no
    other split and it is `usable`, e.g. has labels. `usable` may reject a validation split by raising
    UserError. Raises UserError if there is nothing to train on.
    """
    train = "train" if "train" in splits else None
    if train not in splits:
        raise UserError(
            f"data.source.url: {url} holds only {' and '.join(map(str, splits))} images; name the training "
            "images train, e.g. train/"
        )
    validation = next((split for split in ("val", "test") if split in splits and usable(split)), train)
    left = tuple(split for split in splits if split not in (train, validation))
    return SplitChoice(train, validation, left)


def assign_rows(
    choice: SplitChoice, rows: Mapping[str | None, Numbers], validation_images: int, seed: int
) -> dict[str, Numbers]:
    """Indices of the training and validation images, int64, in the seeded order of the shards.

    Raises UserError if `validation_images` leaves nothing to train on.
    """
    train = rows[choice.train]
    if choice.own_validation:
        validation = rows[choice.validation]
    else:
        if validation_images >= len(train):
            raise UserError(
                f"data.validation_images: {validation_images} leaves nothing to train on of {len(train)} "
                "images"
            )
        chosen, held_out = split_validation(len(train), validation_images, seed)
        train, validation = train[chosen], train[held_out]
    return {
        split: numbers[permutation(len(numbers), seed)]
        for split, numbers in (("train", train), ("val", validation))
    }


def describe_choice(
    choice: SplitChoice, describe: Callable[[str | None], str], validation_images: int
) -> str:
    """The choice in one line; `describe` returns the location and size of a split."""
    train = f"train from {describe(choice.train)}"
    if choice.own_validation:
        return f"{train}; val from {describe(choice.validation)}"
    return f"{train}; val: {validation_images:,} of these, chosen by data.split_seed"


def left_alone(choice: SplitChoice, describe: Callable[[str | None], str]) -> list[str]:
    """A note for each split that is not used."""
    return [
        f"{split} is ignored: {describe(split)}" if split else f"in no split, ignored: {describe(split)}"
        for split in choice.left_alone
    ]
