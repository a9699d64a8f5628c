"""Weights files of checkpoints: writing, locating, fetching, and their metadata."""

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fm_core.checkpoint.format import (
    COMPLETE,
    TENSORS_SUFFIX,
    Progress,
    checkpoint_directories,
    no_progress,
    recorded_files,
    tensors_file,
)
from fm_core.errors import UserError
from fm_core.run.directory import step_name
from fm_core.storage.hashing import sha256_file
from fm_core.storage.store import Store

CHUNK_BYTES = 8 * 2**20
SYNC_BYTES = 256 * 2**20
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
"""Names of dtypes in the safetensors format."""
FETCHED_SECONDS = 600.0
"""Fetched files of other steps are kept this long, because another process may still be loading them."""


def write_tensors(
    directory: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    progress: Progress = no_progress,
    content: Iterable[Tensor] | None = None,
) -> dict[str, Any]:
    """Write one file of tensors into a checkpoint that is not complete yet; return its size and SHA-256.

    The format is that of safetensors, written piece by piece: the library's own writer reports no progress
    until a file of gigabytes is written, and holds a second copy in memory. Where `tensors` has only shapes
    and dtypes (on the device "meta"), `content` yields all of their elements in order, in pieces of any size.
    The hash is that of the bytes before they are written, so that an error of the disk is detected later.
    """
    path = directory / tensors_file(name)
    path.parent.mkdir(exist_ok=True)  # not `parents`: a later job may have removed the checkpoint
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for chunk in _chunks(
            struct.pack("<Q", len(head)) + head, tensors.values() if content is None else content
        ):
            write_chunks(file, chunk, progress)
            progress(f"hashing {path}")
            digest.update(chunk)
            size += len(chunk)
        progress(f"writing {path} to the disk")
        os.fsync(file.fileno())  # by the process that wrote it, since no other can on a file server
    if size != 8 + len(head) + end:
        raise RuntimeError(f"{path}: {size} bytes were written, not {8 + len(head) + end}")
    return {"bytes": size, "sha256": digest.hexdigest()}


def _chunks(head: bytes, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_chunks(file: FileIO, content: memoryview, progress: Progress) -> None:
    """Write bytes and sync every few hundred megabytes, so that no single call takes minutes."""
    while content:
        progress(f"writing {file.name}")
        before = file.tell()
        content = content[file.write(content[:CHUNK_BYTES]) :]
        if file.tell() // SYNC_BYTES > before // SYNC_BYTES:
            os.fsync(file.fileno())


def posthoc_file(run: Path, step: int, name: str) -> Path:
    """Path of a post-hoc average.

    It is in the run directory, because complete checkpoints are never changed.
    """
    return run / "train" / "averages" / step_name(step) / tensors_file(name)


def locate_weights(checkpoints: Store, step: int, name: str, run: Path) -> Path | None:
    """Local file of the weights `name` (raw, ema-...) of a step; None if its checkpoint has none.

    Post-hoc averages are included. From an object store the file is fetched into the run directory `run`.
    Raises UserError if the checkpoint is removed in the meantime.
    """
    posthoc, file = posthoc_file(run, step, name), tensors_file(name)
    if posthoc.exists():
        return posthoc
    checkpoint = Store.at(checkpoints.url, step_name(step))
    if checkpoint.size(file) is None:
        return None
    if checkpoint.local:
        return checkpoint.local / file
    return _fetched(checkpoint, file, run / "train" / "fetched" / step_name(step))


def weights_names(checkpoints: Store, step: int) -> list[str]:
    """Names of all weights in a checkpoint."""
    files = Store.at(checkpoints.url, step_name(step)).sizes()
    return sorted(file.removesuffix(TENSORS_SUFFIX) for file in files if file.endswith(TENSORS_SUFFIX))


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in the metadata of a weights file: network, method, data and progress of its training.

    Raises UserError if the file cannot be read or has none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if "recipe" not in metadata:
        raise UserError(
            f"{path} has no recipe of its network in its metadata; name a file that fm train wrote, or pass "
            "published= to fm_core.load for weights of SiT, DiT or ADM"
        )
    return cast(dict[str, Any], json.loads(metadata["recipe"]))


def verified_sha256(path: Path) -> str:
    """SHA-256 of a weights file, compared with that in its checkpoint if it has one.

    Raises UserError if they differ or the file cannot be read.
    """
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file of weights") from None
    files = recorded_files(path.parent)
    if files is not None and files.get(path.name, {}).get("sha256") != digest:
        raise UserError(
            f"{path} differs from the hash in its checkpoint's {COMPLETE}; sample from another step"
        )
    return digest


def _fetched(checkpoint: Store, file: str, folder: Path) -> Path:
    """A local copy of a checkpoint's file, next to a copy of COMPLETE, which contains its hash.

    The step may have been trained again since the last fetch, so COMPLETE is fetched every time, and the file
    if its hash has changed. Copies of other steps are removed.
    """
    _remove_old_copies(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(checkpoint, COMPLETE, folder)
        facts = (recorded_files(folder) or {}).get(file, {})
        if not (folder / file).exists() or sha256_file(folder / file) != facts.get("sha256"):
            _fetch(checkpoint, file, folder)
    except FileNotFoundError as error:
        raise UserError(
            f"{checkpoint.url} was removed while it was read ({error}); run the command again"
        ) from None
    os.utime(folder)
    return folder / file


def _fetch(checkpoint: Store, name: str, folder: Path) -> None:
    partial = folder / f".{name}.{os.getpid()}.partial"
    checkpoint.fetch(name, partial)
    partial.replace(folder / name)


def _remove_old_copies(folder: Path) -> None:
    for other in checkpoint_directories(folder.parent):
        with suppress(OSError):
            if other != folder and time.time() - other.stat().st_mtime > FETCHED_SECONDS:
                shutil.rmtree(other)
