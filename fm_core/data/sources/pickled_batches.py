"""Batches of downsampled ImageNet in Python pickles, its older file format, and their labels."""

import numpy as np

from fm_core.data.sources.base import ArrayStream
from fm_core.data.sources.npz_members import Location, open_location, open_stream
from fm_core.data.sources.pickles import load_arrays, peek_rows
from fm_core.storage.store import Store


def pickled_shape(store: Store, location: Location, width: int) -> tuple[int, ...]:
    """Shape [rows, width] of a pickled batch; all of it is read if its beginning does not suffice."""
    with open_stream(store, location) as file:
        rows = peek_rows(file, width)
    if rows is not None:
        return rows, width
    with open_stream(store, location) as file:
        return np.asarray(load_arrays(file, f"{store.url}/{location.text}").get("data")).shape


def open_pickled(store: Store, location: Location, rows: int, size: int, classes: int) -> ArrayStream:
    """Read a pickled batch into memory (1.6 GB at 64 pixels, twice that during the read).

    Raises UserError for a pickle of other objects than arrays, ValueError for invalid arrays.
    """
    where = f"{store.url}/{location.text}"
    with open_location(store, location) as file:
        table = load_arrays(file, where)
    data, labels = np.asarray(table.get("data")), np.asarray(table.get("labels"))
    if data.dtype != np.uint8 or data.shape != (rows, 3 * size**2):
        raise ValueError(f"data is {data.dtype} {list(data.shape)}, not uint8 [{rows}, {3 * size**2}]")
    return ArrayStream(data.reshape(rows, 3, size, size), zero_based(labels, rows, classes))


def zero_based(labels: np.ndarray, rows: int, classes: int) -> np.ndarray:
    """Convert labels 1 .. classes to 0 .. classes - 1, int64 [rows]; ValueError for others."""
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}, not integers [{rows}]")
    if labels.min() < 1 or labels.max() > classes:
        raise ValueError(f"labels are {labels.min()} .. {labels.max()}, not 1 .. {classes}")
    return labels.astype(np.int64) - 1
