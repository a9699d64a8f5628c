"""A part of a source that is already in memory."""

import numpy as np
from numpy.typing import NDArray

from fm_core.data.sources.base import Samples


class ArrayStream:
    """Reads images [n, channels, height, width] and labels [n] from arrays."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        self._images = images
        self._labels = labels
        self._row = 0

    def skip(self, rows: int) -> None:
        """Leave out the next rows."""
        self._row += rows

    def read(self, rows: int) -> Samples:
        """The next rows."""
        chosen = slice(self._row, self._row + rows)
        self._row += rows
        labels = None if self._labels is None else self._labels[chosen]
        return Samples(np.ascontiguousarray(self._images[chosen]), labels)

    def close(self) -> None:
        """Nothing to give back."""
