"""Untrusted pickles of arrays: an unpickler restricted to numpy arrays and built-in containers."""

import pickle
import pickletools
from collections.abc import Callable
from typing import IO, Any, cast

import numpy as np

from fm_core.errors import UserError


def _array_builders() -> dict[tuple[str, str], Callable[..., Any]]:
    """Callables that pickled arrays refer to, by their names in all versions of numpy and Python."""
    from numpy._core import multiarray, numeric

    reconstruct = cast(Any, multiarray)._reconstruct
    frombuffer = cast(Any, numeric)._frombuffer
    builders: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # For bytes in pickle protocols of Python 2.
        ("_codecs", "encode"): _encode_latin1,
    }
    for core in ("numpy.core", "numpy._core"):
        builders[f"{core}.multiarray", "_reconstruct"] = reconstruct
        builders[f"{core}.numeric", "_frombuffer"] = frombuffer
    return builders


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], where: str) -> None:
        super().__init__(file, encoding="bytes")
        self._where = where
        self._builders = _array_builders()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return self._builders[module_name, global_name]
        except KeyError:
            raise UserError(
                f"{self._where}: asks for {module_name}.{global_name}; only arrays and plain containers "
                "are unpickled. It is not the published file: download it again"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise UserError(
            f"{self._where}: refers to other objects; it is not the published file: download it again"
        )


def load_arrays(file: IO[bytes], where: str) -> dict[str, Any]:
    """Unpickle a dictionary of arrays, lists and numbers; its keys become text.

    Raises UserError, naming `where`, if the pickle refers to anything else or is damaged.
    """
    try:
        content: object = _ArrayUnpickler(file, where).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{where}: damaged or incomplete ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, not a dictionary of arrays")
    table = cast(dict[Any, Any], content)
    for key, value in table.items():
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            raise UserError(f"{where}: {key!r} is an array of objects, not of numbers")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in table.items()}


def peek_rows(file: IO[bytes], width: int) -> int | None:
    """Rows of the first array [rows, width] of a pickle, without reading its elements; None if not found."""
    numbers: list[int] = []
    try:
        for _, argument, _ in pickletools.genops(cast(Any, _TruncatedFile(file))):
            if isinstance(argument, int):
                numbers.append(argument)
                if argument == width and len(numbers) > 1:
                    return numbers[-2]
    except (ValueError, EOFError):
        return None
    return None


class _TruncatedFile:
    """File that appears to end at the first large read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        return self._file.read(count) if count < 2**20 else b""

    def readline(self) -> bytes:
        return self._file.readline(2**16)
