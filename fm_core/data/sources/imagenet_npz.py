"""Downsampled ImageNet of Chrabaszcz et al. (2017) from image-net.org: .npz or pickled batches.

Imagenet<S>_train_npz.zip (for 64 two parts) holds train_data_batch_1.npz .. _10.npz, and
Imagenet<S>_val_npz.zip holds val_data.npz. In each, `data` is uint8 [n, 3 * S * S], a row being the
red, the green and the blue plane, and `labels` [n] are 1 .. 1000 in the order of map_clsloc.txt
(kit fox = 1), not that of sorted WordNet ids. The publishers resized the full images to a square by a
box filter, so the aspect ratio is not kept, and shuffled the batches. The older family of files holds
Python pickles without a suffix.
"""

import io
import re
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import SourceSection
from fm_core.data.manifest import Input, Interpretation
from fm_core.data.sources.base import Classes, PartStream, Samples, SourceFacts, SourcePart
from fm_core.data.sources.file_listing import list_files, state_of
from fm_core.data.sources.npz_members import (
    Location,
    as_inputs,
    damage_message,
    open_location,
    peek_shape,
    read_array,
    read_npy_header,
    zip_members,
)
from fm_core.data.sources.pickled_batches import open_pickled, pickled_shape, zero_based
from fm_core.errors import UserError
from fm_core.storage.store import Store

CLASSES = 1000
BATCHES = tuple(f"train_data_batch_{number}" for number in range(1, 11))
PUBLISHED = {"train": 1_281_167, "val": 50_000}
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    ValueError,
    NotImplementedError,  # a compression that Python does not support
    RuntimeError,  # an encrypted member
    OSError,
)
BATCH_NAME = re.compile(r"(train_data_batch_\d+|val_data)(\.npz)?", re.ASCII)


class ImagenetNpzSource:
    """Batches under a URL, in zips or extracted, at most two levels deep."""

    def __init__(self, source: SourceSection) -> None:
        if not (source.url and source.image_size):
            raise UserError(
                "data.source.format imagenet-npz needs data.source.url and data.source.image_size"
            )
        self._store = Store.at(source.url)
        self._size = source.image_size
        self._partial = source.allow_partial
        self._batches: dict[str, Location] | None = None
        self.facts = SourceFacts(
            levels=256,
            image_shape=(3, self._size, self._size),
            recipe={
                "source": "imagenet-npz",
                "image_size": self._size,
                "resize": "box filter, whole image squashed to a square, by the publishers",
                "allow_partial": self._partial,
            },
            images=None if self._partial else sum(PUBLISHED.values()),
        )

    def classes(self) -> Classes:
        """The 1,000 classes in the order of map_clsloc.txt."""
        return Classes(CLASSES, "imagenet-clsloc")

    def interpretation(self) -> Interpretation:
        """The batches of the publishers."""
        return Interpretation(
            splits="train from the training batches, val from val_data",
            classes=f"{CLASSES:,}, by number, in the order of map_clsloc.txt",
            pixels="as published: 8 bits, resized by the publishers",
            order="as published: shuffled",
            own_validation=True,
            fair_order=not self._partial,
        )

    def parts(self) -> Sequence[SourcePart]:
        """One part for each batch; names, shapes and counts are checked against the published set."""
        parts = [
            SourcePart(name, "val" if name == "val_data" else "train", self._rows(location), seekable=False)
            for name, location in self._locations().items()
        ]
        for split, published in PUBLISHED.items():
            count = sum(part.rows for part in parts if part.split == split)
            if count != published and not self._partial:
                raise UserError(
                    f"data.source.url: {self._store.url} holds {count:,} {split} images of {self._size} "
                    f"pixels, the published set {published:,}; set data.source.allow_partial to accept it"
                )
        return parts

    def inputs(self) -> Sequence[Input]:
        """The batches."""
        return as_inputs(self._locations().values())

    def state(self) -> str:
        """State of the pickles; `inputs` identifies the other batches by their CRCs."""
        pickles = [item.path for item in self._locations().values() if not item.digest.startswith("crc32:")]
        return state_of(self._store, pickles)

    def check_labels(self) -> None:
        """Check the labels of all batches, several at a time; pickles are read entirely, one by one."""
        parts = self.parts()
        threads = 1 if any(not self._locations()[part.name].name.endswith(".npz") for part in parts) else None
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._check_labels, parts))

    def _check_labels(self, part: SourcePart) -> None:
        location = self._locations()[part.name]
        if not location.name.endswith(".npz"):
            self.open(part).close()
            return
        try:
            zero_based(read_array(self._store, location, "labels"), part.rows, CLASSES)
        except DAMAGE as error:
            raise UserError(damage_message(self._store, location.text, error)) from None

    def open(self, part: SourcePart) -> PartStream:
        """Open a batch; its labels are read and checked."""
        location = self._locations()[part.name]
        try:
            if not location.name.endswith(".npz"):
                return open_pickled(self._store, location, part.rows, self._size, CLASSES)
            return NpzStream(self._store, location, part.rows, self._size)
        except DAMAGE as error:
            raise UserError(damage_message(self._store, location.text, error)) from None

    def release(self) -> None:
        """Do nothing."""

    def _locations(self) -> dict[str, Location]:
        if self._batches is None:
            locations = self._search()
            missing = [name for name in (*BATCHES, "val_data") if name not in locations]
            if missing if not self._partial else not locations:
                raise UserError(self._missing_message(missing))
            order = [name for name in (*BATCHES, "val_data") if name in locations]
            self._batches = {name: locations[name] for name in order}
        return self._batches

    def _search(self) -> dict[str, Location]:
        """Find batches by name; extracted ones are preferred to those in zips."""
        locations: dict[str, Location] = {}
        files = list_files(self._store, depth=3)
        for path, size in files.items():
            if path.endswith(".zip") and re.search(rf"imagenet{self._size}_", path, re.IGNORECASE):
                for member in zip_members(self._store, path):
                    if match := BATCH_NAME.fullmatch(member.name):
                        _prefer(locations, match[1], member)
            elif (match := BATCH_NAME.fullmatch(path.rsplit("/", 1)[-1])) and not self._of_another_size(path):
                packed = zip_members(self._store, path) if match[2] else ()
                digest = ",".join(item.digest for item in packed) or f"{size} bytes"
                _prefer(locations, match[1], Location(path, None, size, digest))
        return locations

    def _of_another_size(self, path: str) -> bool:
        sizes = re.findall(r"imagenet(\d+)", path, re.IGNORECASE)
        return bool(sizes) and str(self._size) not in sizes

    def _missing_message(self, missing: list[str]) -> str:
        first, size = missing[0], self._size
        part = ("part1_" if first in BATCHES[:5] else "part2_") if size == 64 else ""
        kind = "val_" if first == "val_data" else f"train_{part}"
        return (
            f"data.source.url: no Imagenet{size}_{kind}npz.zip (or {first}.npz) under {self._store.url}; "
            f"download Imagenet{size}_train_{'part1_npz.zip, ..._part2_' if size == 64 else ''}npz.zip and "
            f"Imagenet{size}_val_npz.zip from https://image-net.org/download-images (login needed) "
            "and put them there"
        )

    def _rows(self, location: Location) -> int:
        where = f"{self._store.url}/{location.text}"
        width = 3 * self._size**2
        try:
            if location.name.endswith(".npz"):
                shape = _npz_shape(self._store, location)
            else:
                shape = pickled_shape(self._store, location, width)
        except DAMAGE as error:
            raise UserError(damage_message(self._store, location.text, error)) from None
        if len(shape) != 2 or shape[1] != width or shape[0] < 1:
            raise UserError(
                f"{where}: data has the shape {list(shape)}; expected [n, {width}] for "
                f"data.source.image_size {self._size}"
            )
        return shape[0]


def _prefer(locations: dict[str, Location], name: str, location: Location) -> None:
    """Prefer arrays to pickles, then extracted files to members of zips."""

    def rank(item: Location) -> tuple[bool, bool]:
        return item.name.endswith(".npz"), item.member is None

    if name not in locations or rank(location) > rank(locations[name]):
        locations[name] = location


def _npz_shape(store: Store, location: Location) -> tuple[int, ...]:
    shape = peek_shape(store, location, "data")
    if shape is not None:
        return shape
    with (
        open_location(store, location) as file,
        zipfile.ZipFile(file) as npz,
        npz.open("data.npy") as data,
    ):
        return read_npy_header(data)[0]


class NpzStream:
    """Open .npz batch, decompressed a few images at a time."""

    def __init__(self, store: Store, location: Location, rows: int, size: int) -> None:
        self._store = store
        self._location = location
        self._shape = (3, size, size)
        self._row_bytes = 3 * size**2
        self._file = open_location(store, location)
        self._npz = zipfile.ZipFile(self._file)
        self._labels = _read_labels(self._npz, rows)
        self._data: IO[bytes] = self._npz.open("data.npy")
        shape, fortran, dtype = read_npy_header(self._data)
        if dtype != np.uint8 or shape != (rows, self._row_bytes):
            raise ValueError(f"data is {dtype} {list(shape)}, not uint8 [{rows}, {self._row_bytes}]")
        if fortran:
            # Stored pixel by pixel instead of row by row, so the first image requires the entire array.
            content = np.frombuffer(self._data.read(), np.uint8).reshape(shape[::-1])
            self._data = io.BytesIO(np.ascontiguousarray(content.T).tobytes())
        self._row = 0

    def skip(self, rows: int) -> None:
        """Decompress and discard the next rows."""
        while rows:
            step = min(rows, 1024)
            self._take(step)
            rows -= step

    def read(self, rows: int) -> Samples:
        """Read the next rows."""
        labels = self._labels[self._row : self._row + rows]
        images = np.frombuffer(self._take(rows), np.uint8).reshape(rows, *self._shape)
        return Samples(images, labels)

    def close(self) -> None:
        """Close the archive."""
        self._data.close()
        self._npz.close()
        self._file.close()

    def _take(self, rows: int) -> bytes:
        try:
            content = self._data.read(rows * self._row_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(damage_message(self._store, self._location.text, error)) from None
        if len(content) != rows * self._row_bytes:
            raise UserError(damage_message(self._store, self._location.text, EOFError("data is truncated")))
        self._row += rows
        return content


def _read_labels(npz: zipfile.ZipFile, rows: int) -> NDArray[np.int64]:
    """Labels 0 .. 999, int64 [rows]; ValueError if they are not as published."""
    with npz.open("labels.npy") as file:
        labels = np.lib.format.read_array(file, allow_pickle=False)
    return zero_based(labels, rows, CLASSES)
