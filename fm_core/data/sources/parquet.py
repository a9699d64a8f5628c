"""Parquet files with a column of images and one of classes, as in data sets of the Hugging Face hub.

The split of a file is in its name or that of a folder; without such names, validation rows are chosen at
random. Rows are shuffled, because they are often sorted by class. Needs pyarrow.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Interpretation
from fm_core.data.sources.base import UNLABELED, Classes
from fm_core.data.sources.class_folders import describe_classes, ordered, untrained_numbers
from fm_core.data.sources.file_listing import composed, count_endings, list_files, printable
from fm_core.data.sources.image_collection import (
    FoundImages,
    ImageCollection,
    ImageFileSource,
    ambiguous_values,
    image_file_facts,
    pixel_rules,
)
from fm_core.data.sources.parquet_rows import ParquetRows, is_text, largest_value, open_parquet, values_dtype
from fm_core.data.sources.split_conflicts import splits_of_data_files
from fm_core.data.sources.split_selection import (
    SplitChoice,
    assign_rows,
    choose_splits,
    describe_choice,
    left_alone,
)
from fm_core.errors import UserError
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store

RECIPE_VERSION = 2
"""2: rows are shuffled; splits are also recognized by folders, and a test split is ignored."""

CAPTION_SHARE = 0.5
FEWEST_CAPTIONS = 20
"""From this number of rows on, strings of which more than CAPTION_SHARE are distinct are not classes."""


class ParquetSource(ImageFileSource):
    """Rows of parquet files."""

    def __init__(self, config: DataSection) -> None:
        source = config.source
        extra = {
            "image_column": source.image_column,
            "label_column": source.label_column,
            "validation_images": config.validation_images,
        }
        super().__init__(
            image_file_facts(config, "parquet", extra, RECIPE_VERSION),
            source.resize,
            pixel_rules(config, True),
            str(source.url),
        )
        self._store = Store.at(str(source.url))
        self._image, self._label = source.image_column, source.label_column
        self._validation_images, self._seed = config.validation_images, config.split_seed

    def find(self) -> FoundImages:
        """List the files, choose the splits, and read and check the labels of all used rows."""
        listed = list_files(self._store, depth=None)
        files = {path: size for path, size in listed.items() if path.lower().endswith(".parquet")}
        if not files:
            raise UserError(
                f"data.source.url: no .parquet files under {self._store.url}; put train-*.parquet and "
                "validation-*.parquet there"
            )
        counts = {path: self._rows(path) for path in files}
        self._refuse_bits(files)
        splits: dict[str | None, list[str]] = {}
        for path, split in splits_of_data_files(list(files), self._url).items():
            splits.setdefault(split, []).append(path)

        def usable(split: str) -> bool:
            return split == "val" or self._label is None or self._has_labels(splits[split])

        def describe(split: str | None) -> str:
            paths = splits[split]
            more = f" and {len(paths) - 1:,} more files" if len(paths) > 1 else ""
            return f"{printable(paths[0])}{more} ({sum(counts[path] for path in paths):,} rows)"

        filled = [split for split, paths in splits.items() if any(counts[path] for path in paths)]
        if not filled:
            raise UserError(f"data.source.url: no rows in the .parquet files under {self._store.url}")
        choice = choose_splits(filled, self._url, usable)
        paths = [path for split in choice.used for path in splits[split]]
        classes, labels = self._labels_of_all(paths)
        archive = ParquetRows(
            self._store,
            {path: files[path] for path in paths},
            {path: counts[path] for path in paths},
            self._image,
        )
        rows = self._numbers(choice, splits, counts)
        selected = assign_rows(choice, rows, self._validation_images, self._seed)
        return FoundImages(
            {split: ImageCollection(archive, labels, numbers) for split, numbers in selected.items()},
            classes,
            Interpretation(
                splits=describe_choice(choice, describe, self._validation_images),
                classes=describe_classes(classes) + (f" (column {self._label})" if classes.count else ""),
                order="all splits shuffled by data.split_seed",
                own_validation=choice.own_validation,
                fair_order=True,
                not_read=count_endings(path for path in listed if path not in files),
                remarks=(
                    *left_alone(choice, describe),
                    *(untrained_numbers(classes, labels[rows[choice.train]]) if labels is not None else ()),
                ),
            ),
        )

    def release(self) -> None:
        """Remove the temporary copy of the images."""
        if self._images is not None:
            for archive in self._archives():
                assert isinstance(archive, ParquetRows)
                archive.release()

    def _numbers(
        self, choice: SplitChoice, splits: dict[str | None, list[str]], counts: dict[str, int]
    ) -> dict[str | None, NDArray[np.int64]]:
        """Indices of the rows of each used split, which are consecutive."""
        rows: dict[str | None, NDArray[np.int64]] = {}
        first = 0
        for split in choice.used:
            count = sum(counts[path] for path in splits[split])
            rows[split] = np.arange(first, first + count, dtype=np.int64)
            first += count
        return rows

    def _rows(self, path: str) -> int:
        """Number of rows; UserError if a column is missing, or contains values of an unknown range."""
        file = open_parquet(self._store, path)
        with file:
            schema = file.schema_arrow
            for key, column in (("image", self._image), ("label", self._label)):
                if column is not None and column not in schema.names:
                    raise UserError(
                        f"data.source.{key}_column: no column {column} in {printable(path)}, only "
                        f"{', '.join(schema.names)}"
                    )
            kind = values_dtype(schema.field(self._image).type)
            if kind is not None and kind.kind == "f" and self._rules.value_range is None:
                raise ambiguous_values(f"{self._url}/{printable(path)}: {self._image}", str(kind))
            return int(file.metadata.num_rows)

    def _refuse_bits(self, paths: Iterable[str]) -> None:
        """Raise UserError for integers whose maximum over all files is 1, because 1 would then be white."""
        if self._rules.value_range is not None:
            return
        first, kind = "", None
        for path in paths:
            with open_parquet(self._store, path) as file:
                dtype = values_dtype(file.schema_arrow.field(self._image).type)
                if not file.metadata.num_rows:
                    continue
                bits = dtype is not None and dtype.kind in "iu" and dtype.name not in ("uint8", "uint16")
                if not bits or largest_value(file, self._image) != 1:
                    return
                first, kind = first or path, kind or dtype
        if kind is not None:
            raise ambiguous_values(f"{self._url}/{printable(first)}: {self._image} (0 and 1 only)", str(kind))

    def _has_labels(self, paths: list[str]) -> bool:
        """Whether any row has a label; labels of a test set are often all -1 or missing."""
        for path in paths:
            column = open_parquet(self._store, path).read([self._label])[self._label]
            if any(label not in (None, -1, "") for label in column.to_pylist()):
                return True
        return False

    def _labels_of_all(self, paths: list[str]) -> tuple[Classes, NDArray[np.int64] | None]:
        """The classes, and the class of each row of all files.

        Integer labels are named by the hub's description of the columns, if there is one; strings are names.
        """
        if self._label is None:
            return UNLABELED, None
        labels = {path: self._labels_of(path) for path in paths}
        filled = {path: values for path, values in labels.items() if len(values)}
        texts = [path for path, values in filled.items() if values.dtype.kind == "U"]
        if texts and len(texts) < len(filled):
            other = next(path for path in filled if path not in texts)
            raise UserError(
                f"{self._store.url}: {self._label} is text in {printable(texts[0])} and numbers in "
                f"{printable(other)}; classes are all names or all numbers"
            )
        described = self._described_names(paths)
        if texts:
            class_names = {str(name) for values in filled.values() for name in np.unique(values)}
            self._refuse_captions(len(class_names), sum(map(len, filled.values())))
            names = described if described and class_names <= set(described) else tuple(ordered(class_names))
            numbers = {name: number for number, name in enumerate(names)}
            values = {path: [numbers[str(name)] for name in values] for path, values in labels.items()}
            return self._named(names), np.concatenate([np.array(v, np.int64) for v in values.values()])
        highest = {path: int(np.max(values, initial=-1)) for path, values in labels.items()}
        count = len(described) if described else max(highest.values()) + 1
        for path, largest in highest.items():
            if largest >= count:
                where = f"{self._store.url}/{printable(path)}: {self._label}"
                raise UserError(f"{where} goes to {largest}; there are {count} classes")
        classes = self._named(described) if described else Classes(count, f"parquet-{self._label}")
        return classes, np.concatenate(list(labels.values()))

    def _refuse_captions(self, distinct: int, rows: int) -> None:
        """Raise UserError for strings that mostly occur in only one row."""
        if rows >= FEWEST_CAPTIONS and distinct > CAPTION_SHARE * rows:
            raise UserError(
                f"data.source.label_column: {self._label} has {distinct:,} different texts in {rows:,} rows, "
                "which are no classes; set it to a column of classes, or to null"
            )

    def _named(self, names: tuple[str, ...]) -> Classes:
        digest = sha256_bytes("\n".join(names).encode("utf-8", "surrogateescape"))[:8]
        return Classes(len(names), f"parquet-{self._label}-{digest}", tuple(map(printable, names)))

    def _described_names(self, paths: list[str]) -> tuple[str, ...] | None:
        """Class names in the hub's description of the columns; UserError if files have different ones."""
        descriptions: dict[tuple[str, ...], str] = {}
        for path in paths:
            schema = open_parquet(self._store, path).schema_arrow
            names = _class_names((schema.metadata or {}).get(b"huggingface"), str(self._label))
            if names:
                descriptions.setdefault(names, path)
        if len(descriptions) > 1:
            first, second = list(descriptions.values())[:2]
            raise UserError(
                f"{self._store.url}: {self._label} has other class names in {printable(first)} than in "
                f"{printable(second)}; add the folder of one of them to data.source.url"
            )
        return next(iter(descriptions), None)

    def _labels_of(self, path: str) -> NDArray[Any]:
        """Labels of a file, int64 or strings; UserError unless they are integers from 0 or names."""
        column = open_parquet(self._store, path).read([self._label])[self._label]
        where = f"{self._store.url}/{printable(path)}: {self._label}"
        if not len(column):
            return np.empty(0, np.int64)
        if is_text(column.type):
            texts = column.to_pylist()
            if missing := sum(text is None or not text for text in texts):
                raise UserError(
                    f"{where} is missing in {missing:,} of {len(texts):,} rows; each needs a class"
                )
            return np.array([composed(text) for text in texts], np.str_)
        labels: NDArray[Any] = np.asarray(column.to_numpy())
        if labels.dtype.kind not in "iub":
            raise UserError(
                f"{where} is of {labels.dtype} or has missing values; classes are integers from 0, or names"
            )
        if labels.min() < 0:
            raise UserError(f"{where} contains {labels.min()}; classes are integers from 0")
        return labels.astype(np.int64)


def _class_names(description: bytes | None, label: str) -> tuple[str, ...] | None:
    """Class names in the hub's description of the columns."""
    if description is None:
        return None
    try:
        feature = json.loads(description).get("info", {}).get("features", {}).get(label, {})
        names = feature.get("names")
    except (ValueError, AttributeError):
        return None
    return tuple(composed(str(name)) for name in names) if names else None
