"""Weights of extractors: a file that the user names, checked against its hash before it is opened."""

import shutil
from pathlib import Path
from typing import Any, cast

import fsspec

from fm_core.errors import UserError
from fm_core.storage.hashing import sha256_bytes, sha256_file
from fm_core.storage.store import Store


def verified_weights(where: str, sha256: str | None, root: str, name: str) -> tuple[Path, str]:
    """A local file of the weights at a path or URL, and its SHA-256.

    What is fetched from a URL is kept beside the data set, where it is checked again each time.

    Args:
        where: path or fsspec URL.
        sha256: what the file must hash to, in hexadecimal; None takes any.
        root: data.root.
        name: data.name.

    Raises:
        UserError: the file cannot be read or fetched, or its hash differs.
    """
    local = _fetched(where, root, name) if "://" in where else Path(where)
    try:
        found = sha256_file(local)
    except OSError as error:
        raise UserError(f"evaluate.weights: {where} cannot be read ({error.strerror})") from None
    if sha256 and found != sha256.lower():
        if "://" in where:
            local.unlink()
        raise UserError(
            f"evaluate.weights: {where} has the SHA-256 {found}, not {sha256}; it is not the file that was "
            "meant (evaluate.weights_sha256), and was not loaded"
        )
    return local, found


def _fetched(where: str, root: str, name: str) -> Path:
    store = Store.at(root, name, "evaluation")
    folder = store.local or Path.home() / ".cache" / "flow-matching-pipeline"
    target = folder / f"weights-{sha256_bytes(where.encode())[:12]}{Path(where).suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with cast(Any, fsspec.open(where, "rb")) as source, partial.open("wb") as file:
            shutil.copyfileobj(source, file)
    except ImportError as error:
        raise UserError(f"evaluate.weights: {where}: {error}; or fetch the file and give its path") from None
    except Exception as error:  # every file system has its own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"evaluate.weights: {where} cannot be fetched: {reason}") from None
    partial.replace(target)
    return target
