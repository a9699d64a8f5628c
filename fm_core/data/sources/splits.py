"""Seeded permutations that never change: selection of validation images, and shuffling of sorted files."""

import numpy as np
from numpy.typing import NDArray


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count - 1, int64 [count].

    Computed from the generator's raw bits, as numpy's permutation may change between versions.
    """
    keys = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def split_validation(count: int, validation: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training images and of `validation` validation images, each ascending, int64."""
    shuffled = permutation(count, seed)
    return np.sort(shuffled[validation:]), np.sort(shuffled[:validation])
