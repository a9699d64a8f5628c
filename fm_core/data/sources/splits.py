"""Seeded permutations that never change: who is held out, and the order of files sorted by class."""

import numpy as np
from numpy.typing import NDArray


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count - 1, int64 [count].

    From the generator's raw bits, as numpy's own permutation may change between versions.
    """
    keys = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def hold_out(count: int, held_out: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and `held_out` indices for validation, each ascending."""
    shuffled = permutation(count, seed)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])
