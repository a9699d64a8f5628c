"""Images in the rows of parquet files, by number. Needs pyarrow.

Parquet files can be read only by row group, but shards take the rows in a random order, so the first read
copies the column of images to a local file.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from fm_core.data.manifest import Input
from fm_core.data.sources.file_listing import printable, state_of
from fm_core.data.sources.npz_members import damage_message
from fm_core.data.sources.scratch_folder import ScratchFolder
from fm_core.errors import ImageDecodingError, UserError
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store

CONTENT, OFFSETS = "content", "offsets.npy"


class RowKeys(Sequence[str]):
    """Names of rows, path#row, created on access."""

    def __init__(self, counts: dict[str, int]) -> None:
        self._paths = list(counts)
        self._ends = np.cumsum(list(counts.values()))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        file = int(np.searchsorted(self._ends, index, "right"))
        return f"{self._paths[file]}#{index - (int(self._ends[file - 1]) if file else 0)}"


class ParquetRows:
    """The column of images of several parquet files."""

    def __init__(self, store: Store, sizes: dict[str, int], counts: dict[str, int], column: str) -> None:
        """sizes, counts: bytes and rows of each file."""
        self._store, self._sizes, self._column = store, sizes, column
        self.keys: Sequence[str] = RowKeys(counts)
        self.others: Sequence[str] = []
        self._offsets: NDArray[np.int64] | None = None
        self._file: Any = None
        self._scratch: ScratchFolder | None = None

    def read(self, number: int) -> bytes:
        """Content of an image file, or of a .npy file for an array; ImageDecodingError without either."""
        if self._offsets is None or self._file is None:
            folder = self._copies().fill(self._copy, sum(self._sizes.values()))
            self._offsets = cast(NDArray[np.int64], np.load(folder / OFFSETS, mmap_mode="r"))
            self._file = (folder / CONTENT).open("rb")
        start, stop = int(self._offsets[number]), int(self._offsets[number + 1])
        if start == stop:
            raise ImageDecodingError("no image")
        self._file.seek(start)
        return self._file.read(stop - start)

    def read_other(self, path: str) -> bytes:
        """Not supported: there are no other files."""
        raise FileNotFoundError(path)

    def close(self) -> None:
        """Close the copy; another process may remove it, and a later read recreates it."""
        if self._file is not None:
            self._file.close()
        if self._scratch is not None:
            self._scratch.leave()
        self._file, self._offsets = None, None

    def release(self) -> None:
        """Remove the copy."""
        self.close()
        self._copies().remove()

    def inputs(self) -> tuple[Input, ...]:
        """The files; each is identified by its footer, which contains the offset and size of every column."""
        return tuple(
            Input(name=printable(path), bytes=size, digest=f"footer-sha256:{self._footer_digest(path, size)}")
            for path, size in self._sizes.items()
        )

    def state(self) -> str:
        """State of all files, because a footer does not identify all of the content."""
        return state_of(self._store, self._sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_offsets": None}

    def _copies(self) -> ScratchFolder:
        if self._scratch is None:
            identity = f"{self._store.url} {self._column} {self.inputs()} {self.state()}"
            self._scratch = ScratchFolder(identity)
        return self._scratch

    def _copy(self, folder: Path) -> None:
        """Write the images of all rows to a file, and their offsets."""
        offsets = [0]
        with (folder / CONTENT).open("wb") as file:
            for path in self._sizes:
                for cell in self._cells(path):
                    offsets.append(offsets[-1] + file.write(cell))
        np.save(folder / OFFSETS, np.array(offsets, np.int64))

    def _cells(self, path: str) -> Iterator[bytes]:
        from pyarrow import ArrowException

        file = open_parquet(self._store, path)
        try:
            field = file.schema_arrow.field(self._column)
            kind = values_dtype(field.type)
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=[self._column])[self._column]
                for cell in column:
                    yield _content(cell.as_py(), kind)
        except (ArrowException, OSError) as error:
            raise UserError(damage_message(self._store, path, error)) from None
        finally:
            file.close()

    def _footer_digest(self, path: str, size: int) -> str:
        footer = int.from_bytes(self._store.read_range(path, size - 8, size - 4), "little")
        return sha256_bytes(self._store.read_range(path, max(0, size - 8 - footer), size))


def open_parquet(store: Store, path: str) -> Any:
    """Open a file; UserError if it is damaged, or pyarrow is not installed."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError("data.source.format: parquet needs pyarrow: pip install pyarrow") from None
    try:
        return cast(Any, parquet).ParquetFile(store.open(path))
    except (ArrowException, OSError) as error:
        raise UserError(damage_message(store, printable(path), error)) from None


def values_dtype(kind: Any) -> np.dtype[Any] | None:
    """Type of the values of nested lists; None for a column of files."""
    nested = False
    while hasattr(kind, "storage_type") or _is_list(kind):
        nested = nested or _is_list(kind)
        kind = kind.storage_type if hasattr(kind, "storage_type") else kind.value_type
    return np.dtype(kind.to_pandas_dtype()) if nested else None


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return any(getattr(types, test)(kind) for test in ("is_list", "is_large_list", "is_fixed_size_list"))


def is_text(kind: Any) -> bool:
    """Whether the values of a type are strings, or dictionary-encoded strings."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def largest_value(file: Any, column: str) -> int | None:
    """Largest integer in the lists of a column, or the first row-group maximum above 1; None without any."""
    largest: int | None = None
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        leaves = [group.column(leaf) for leaf in range(group.num_columns)]
        statistics = [leaf.statistics for leaf in leaves if leaf.path_in_schema.split(".")[0] == column]
        if len(statistics) == 1 and statistics[0] is not None and statistics[0].has_min_max:
            value = statistics[0].max
        else:
            value = _largest_of(file.read_row_group(number, columns=[column])[column])
        if value is not None:
            largest = int(value) if largest is None else max(largest, int(value))
        if largest is not None and largest > 1:
            break
    return largest


def _largest_of(column: Any) -> int | None:
    values: list[int] = []
    for chunk in column.chunks:
        while hasattr(chunk, "storage") or _is_list(chunk.type):
            chunk = chunk.storage if hasattr(chunk, "storage") else chunk.flatten()
        array = np.asarray(chunk.drop_null())
        values += [int(array.max())] if array.size else []
    return max(values, default=None)


def _content(cell: Any, kind: np.dtype[Any] | None) -> bytes:
    """File content of a value: an encoded image unchanged, an array as .npy; b"" for anything else."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return content
    if kind is None or not isinstance(content, list):
        return b""
    try:
        array = np.asarray(content, kind)
    except (ValueError, TypeError, OverflowError):
        return b""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
