"""Parquet files with a column of images and one of classes, as in data sets of the Hugging Face hub.

Files named train* and validation*, valid*, val* or test* are the splits; without such names validation rows
are chosen at random. Needs pyarrow.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Input
from fm_core.data.sources.base import UNLABELED, Classes, Rejected, Samples, SourcePart
from fm_core.data.sources.file_listing import list_files, state_of
from fm_core.data.sources.image_collection import image_file_facts
from fm_core.data.sources.image_decoding import decode
from fm_core.data.sources.npz_members import damage_message
from fm_core.data.sources.splits import split_validation
from fm_core.errors import ImageDecodingError, UserError
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store

SPLITS = {"train": re.compile(r"train"), "val": re.compile(r"val|test")}


class ParquetSource:
    """Source with one part for each file and split."""

    def __init__(self, config: DataSection) -> None:
        source = config.source
        extra = {
            "image_column": source.image_column,
            "label_column": source.label_column,
            "validation_images": config.validation_images,
        }
        self.facts = image_file_facts(config, "parquet", extra)
        assert source.url
        self._store = Store.at(source.url)
        self._columns = (source.image_column, source.label_column)
        self._size, self._resize = self.facts.image_shape[-1], source.resize
        self._validation_images, self._seed = config.validation_images, config.split_seed
        self._files: dict[str, int] = {}
        self._rows: dict[str, NDArray[np.int64]] = {}
        self._classes: Classes | None = None

    def classes(self) -> Classes:
        """Named classes, if the files have the hub's description; otherwise 0 .. the largest label."""
        if self._classes is None:
            self._classes = self._find_classes()
        return self._classes

    def parts(self) -> Sequence[SourcePart]:
        """Parts, train first, files in the order of their names."""
        counts = {path: self._open(path).metadata.num_rows for path in self._list()}
        named = {
            split: [path for path in counts if pattern.match(path.rsplit("/", 1)[-1])]
            for split, pattern in SPLITS.items()
        }
        if all(named.values()):
            self._rows = {
                f"{split}:{path}": np.arange(counts[path], dtype=np.int64)
                for split, paths in named.items()
                for path in paths
            }
        else:
            self._rows = self._split_validation(counts)
        return [
            SourcePart(name, name.split(":")[0], len(rows)) for name, rows in self._rows.items() if len(rows)
        ]

    def inputs(self) -> Sequence[Input]:
        """The files; each is identified by its footer, which holds the offset and size of every column."""
        return [
            Input(name=path, bytes=size, digest=f"footer-sha256:{self._footer_digest(path, size)}")
            for path, size in self._list().items()
        ]

    def state(self) -> str:
        """State of all files, as a footer does not identify all of the content."""
        return state_of(self._store, self._list())

    def check_labels(self) -> None:
        """Check the labels of every file."""
        count = self.classes().count
        if count is None:
            return
        for path in self._list():
            highest = int(np.max(self._labels_of(path), initial=-1))
            if highest >= count:
                where = f"{self._store.url}/{path}: {self._columns[1]}"
                raise UserError(f"{where} goes to {highest}; there are {count} classes")

    def open(self, part: SourcePart) -> "ParquetStream":
        """Open the rows of a file that belong to a split."""
        if not self._rows:
            self.parts()
        path = part.name.split(":", 1)[1]
        return ParquetStream(
            self._open(path), f"{path}#", self._rows[part.name], self._columns, self._size, self._resize
        )

    def _list(self) -> dict[str, int]:
        if not self._files:
            files = list_files(self._store, depth=2)
            self._files = {path: size for path, size in files.items() if path.endswith(".parquet")}
        if not self._files:
            raise UserError(
                f"data.source.url: no .parquet files under {self._store.url}; put train-*.parquet and "
                "validation-*.parquet there"
            )
        return self._files

    def _split_validation(self, counts: dict[str, int]) -> dict[str, NDArray[np.int64]]:
        total = sum(counts.values())
        if self._validation_images >= total:
            raise UserError(
                f"data.validation_images: {self._validation_images} leaves nothing to train on of {total} "
                "rows"
            )
        rows: dict[str, NDArray[np.int64]] = {}
        for split, chosen in zip(
            SPLITS, split_validation(total, self._validation_images, self._seed), strict=True
        ):
            first = 0
            for path, count in counts.items():
                rows[f"{split}:{path}"] = chosen[(chosen >= first) & (chosen < first + count)] - first
                first += count
        return rows

    def _open(self, path: str) -> Any:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise UserError("data.source.format: parquet needs pyarrow: pip install pyarrow") from None
        try:
            return cast(Any, parquet).ParquetFile(self._store.open(path))
        except (ArrowException, OSError) as error:
            raise UserError(damage_message(self._store, path, error)) from None

    def _find_classes(self) -> Classes:
        image, label = self._columns
        paths = list(self._list())
        schema = self._open(paths[0]).schema_arrow
        for column in (image, label):
            if column is not None and column not in schema.names:
                raise UserError(
                    f"data.source.{'image' if column == image else 'label'}_column: no column {column} in "
                    f"{paths[0]}, only {', '.join(schema.names)}"
                )
        if label is None:
            return UNLABELED
        names = _class_names((schema.metadata or {}).get(b"huggingface"), label)
        if names:
            digest = sha256_bytes("\n".join(names).encode())[:8]
            return Classes(len(names), f"parquet-{label}-{digest}", names)
        highest = max(int(np.max(self._labels_of(path), initial=-1)) for path in paths)
        return Classes(highest + 1, f"parquet-{label}")

    def _labels_of(self, path: str) -> NDArray[Any]:
        """Labels of a file; UserError unless they are integers from 0."""
        column = self._columns[1]
        labels = np.asarray(self._open(path).read([column])[column].to_numpy())
        where = f"{self._store.url}/{path}: {column}"
        if labels.dtype.kind not in "iub":
            raise UserError(
                f"{where} is of {labels.dtype} or has missing values; classes are integers from 0"
            )
        if len(labels) and labels.min() < 0:
            raise UserError(f"{where} holds {labels.min()}; classes are integers from 0")
        return labels

    def _footer_digest(self, path: str, size: int) -> str:
        footer = int.from_bytes(self._store.read_range(path, size - 8, size - 4), "little")
        return sha256_bytes(self._store.read_range(path, max(0, size - 8 - footer), size))


class ParquetStream:
    """Selected rows of an open file, one row group in memory at a time."""

    def __init__(
        self,
        file: Any,
        key: str,
        rows: NDArray[np.int64],
        columns: tuple[str, str | None],
        size: int,
        resize: str,
    ) -> None:
        self._file, self._key, self._rows = file, key, rows
        self._image, self._label = columns
        self._size, self._resize = size, resize
        self._row = 0
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._ends = np.cumsum(counts)
        self._group = -1
        self._table: Any = None

    def skip(self, rows: int) -> None:
        """Skip the next rows."""
        self._row += rows

    def read(self, rows: int) -> Samples:
        """Decode the next rows; those that cannot be decoded are rejected."""
        images = np.empty((rows, 3, self._size, self._size), np.uint8)
        labels: list[int] = []
        rejected: list[Rejected] = []
        decoded = 0
        for row, content, label in self._select(rows):
            try:
                images[decoded] = self._image_of(content)
            except ImageDecodingError as error:
                digest = sha256_bytes(content if isinstance(content, bytes) else b"")
                rejected.append(Rejected(f"{self._key}{row}", str(error), digest))
            else:
                decoded += 1
                labels.append(label)
        labeled = None if self._label is None else np.array(labels, np.int64)
        return Samples(images[:decoded], labeled, tuple(rejected))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _select(self, rows: int) -> Iterator[tuple[int, Any, int]]:
        """Row number, image cell and label of the next rows."""
        for row in self._rows[self._row : self._row + rows].tolist():
            group = int(np.searchsorted(self._ends, row, "right"))
            if group != self._group:
                columns = [name for name in (self._image, self._label) if name is not None]
                self._table, self._group = self._file.read_row_group(group, columns=columns), group
            place = row - (int(self._ends[group - 1]) if group else 0)
            label = -1 if self._label is None else int(self._table[self._label][place].as_py())
            yield row, self._table[self._image][place].as_py(), label
        self._row += rows

    def _image_of(self, cell: Any) -> NDArray[np.uint8]:
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(content, bytes):
            return decode(content, self._size, self._resize)
        try:
            pixels = np.asarray(content, np.uint8)
        except (ValueError, TypeError, OverflowError):
            raise ImageDecodingError("no image") from None
        if pixels.shape == (self._size, self._size, 3):
            return pixels.transpose(2, 0, 1)
        if pixels.shape != (3, self._size, self._size):
            raise ImageDecodingError("another size")
        return pixels


def _class_names(description: bytes | None, label: str) -> tuple[str, ...] | None:
    """Class names in the hub's description of the columns."""
    if description is None:
        return None
    feature = json.loads(description).get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names")
    return tuple(map(str, names)) if names else None
