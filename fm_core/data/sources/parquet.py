"""Parquet files with a column of images and one of classes, as data sets of the Hugging Face hub have.

Files named train* and validation*, valid*, val* or test* are the splits; without such names some rows are
held out. Needs pyarrow.
"""

import hashlib
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
from fm_core.data.sources.splits import hold_out
from fm_core.errors import ImageDecodingError, UserError
from fm_core.storage.store import Store

SPLITS = {"train": re.compile(r"train"), "val": re.compile(r"val|test")}


class ParquetSource:
    """One part for each file and split."""

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
        self._held_out, self._seed = config.validation_images, config.split_seed
        self._files: dict[str, int] = {}
        self._rows: dict[str, NDArray[np.int64]] = {}
        self._classes: Classes | None = None

    def classes(self) -> Classes:
        """Named classes, where the files carry the hub's description; else as many as labels go to."""
        if self._classes is None:
            self._classes = self._find_classes()
        return self._classes

    def parts(self) -> Sequence[SourcePart]:
        """Train first, files in the order of their names."""
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
            self._rows = self._hold_out(counts)
        return [
            SourcePart(name, name.split(":")[0], len(rows)) for name, rows in self._rows.items() if len(rows)
        ]

    def inputs(self) -> Sequence[Input]:
        """The files; each is named by its footer, which holds the place and size of every column."""
        return [
            Input(name=path, bytes=size, digest=f"footer-sha256:{self._footer_digest(path, size)}")
            for path, size in self._list().items()
        ]

    def state(self) -> str:
        """Of all files: a footer does not tell all of the content."""
        return state_of(self._store, self._list())

    def check_labels(self) -> None:
        """Read the column of labels of every file."""
        count = self.classes().count
        if count is None:
            return
        for path in self._list():
            highest = int(np.max(self._labels_of(path), initial=-1))
            if highest >= count:
                where = f"{self._store.url}/{path}: {self._columns[1]}"
                raise UserError(f"{where} goes to {highest}; there are {count} classes")

    def open(self, part: SourcePart) -> "ParquetStream":
        """Start to read the rows of a file that belong to a split."""
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

    def _hold_out(self, counts: dict[str, int]) -> dict[str, NDArray[np.int64]]:
        total = sum(counts.values())
        if self._held_out >= total:
            raise UserError(
                f"data.validation_images: {self._held_out} leaves nothing to train on of {total} rows"
            )
        rows: dict[str, NDArray[np.int64]] = {}
        for split, chosen in zip(SPLITS, hold_out(total, self._held_out, self._seed), strict=True):
            first = 0
            for path, count in counts.items():
                rows[f"{split}:{path}"] = chosen[(chosen >= first) & (chosen < first + count)] - first
                first += count
        return rows

    def _open(self, path: str) -> Any:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise UserError("data.source.format parquet needs pyarrow: pip install pyarrow") from None
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
            digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
            return Classes(len(names), f"parquet-{label}-{digest}", names)
        highest = max(int(np.max(self._labels_of(path), initial=-1)) for path in paths)
        return Classes(highest + 1, f"parquet-{label}")

    def _labels_of(self, path: str) -> NDArray[Any]:
        """The column of labels of a file, integers; UserError for anything else and for negative ones."""
        column = self._columns[1]
        labels = np.asarray(self._open(path).read([column])[column].to_numpy())
        where = f"{self._store.url}/{path}: {column}"
        if labels.dtype.kind not in "iub":
            raise UserError(f"{where} is of {labels.dtype} or misses values; classes are integers from 0")
        if len(labels) and labels.min() < 0:
            raise UserError(f"{where} holds {labels.min()}; classes are integers from 0")
        return labels

    def _footer_digest(self, path: str, size: int) -> str:
        footer = int.from_bytes(self._store.read_range(path, size - 8, size - 4), "little")
        return hashlib.sha256(self._store.read_range(path, max(0, size - 8 - footer), size)).hexdigest()


class ParquetStream:
    """Rows of an open file, one row group in memory at a time."""

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
        """Leave out the next rows."""
        self._row += rows

    def read(self, rows: int) -> Samples:
        """Decode the next rows."""
        images = np.empty((rows, 3, self._size, self._size), np.uint8)
        labels: list[int] = []
        rejected: list[Rejected] = []
        kept = 0
        for row, content, label in self._cells(rows):
            try:
                images[kept] = self._picture(content)
            except ImageDecodingError as error:
                digest = hashlib.sha256(content if isinstance(content, bytes) else b"").hexdigest()
                rejected.append(Rejected(f"{self._key}{row}", str(error), digest))
            else:
                kept += 1
                labels.append(label)
        labeled = None if self._label is None else np.array(labels, np.int64)
        return Samples(images[:kept], labeled, tuple(rejected))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cells(self, rows: int) -> Iterator[tuple[int, Any, int]]:
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

    def _picture(self, cell: Any) -> NDArray[np.uint8]:
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
    """Names of classes from the hub's description of the columns."""
    if description is None:
        return None
    feature = json.loads(description).get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names")
    return tuple(map(str, names)) if names else None
