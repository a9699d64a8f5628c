"""Weights of feature extractors: fetch a file and verify its hash before it is loaded."""

import shutil
from pathlib import Path
from typing import Any, cast

import fsspec

from fm_core.errors import UserError
from fm_core.storage.hashing import sha256_bytes, sha256_file
from fm_core.storage.local_paths import cache_home, expand_home
from fm_core.storage.store import Store


def verified_weights(where: str, sha256: str | None, root: str, name: str) -> tuple[Path, str]:
    """Return the local path of the weights at a path or URL, and their SHA-256.

    A file fetched from a URL is cached beside the data set and verified again each time.

    Args:
        where: path or fsspec URL.
        sha256: the expected hash, in hexadecimal; None accepts any.
        root: data.root.
        name: data.name.

    Raises:
        UserError: the file cannot be read or fetched, or its hash differs.
    """
    local = _fetch(where, root, name) if "://" in where else expand_home(where)
    try:
        actual = sha256_file(local)
    except OSError as error:
        raise UserError(f"evaluate.weights: {where} cannot be read ({error.strerror})") from None
    if sha256 and actual != sha256.lower():
        if "://" in where:
            local.unlink()
        raise UserError(
            f"evaluate.weights: {where} has SHA-256 {actual}, but {sha256} is expected "
            "(evaluate.weights_sha256); it was not loaded"
        )
    return local, actual


def _fetch(where: str, root: str, name: str) -> Path:
    store = Store.at(root, name, "evaluation")
    folder = store.local or cache_home() / "flow-matching-pipeline"
    target = folder / f"weights-{sha256_bytes(where.encode())[:12]}{Path(where).suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with cast(Any, fsspec.open(where, "rb")) as source, partial.open("wb") as file:
            shutil.copyfileobj(source, file)
    except ImportError as error:
        raise UserError(
            f"evaluate.weights: {where}: {error}; install it, or download the file and give its path"
        ) from None
    except Exception as error:  # fsspec implementations raise their own exception types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"evaluate.weights: {where} cannot be fetched: {reason}") from None
    partial.replace(target)
    return target
