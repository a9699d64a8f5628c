"""CRC-32 and SHA-256 of bytes, files and plain values; hexadecimal digests."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import StringConstraints

try:
    from isal.isal_zlib import crc32  # the same value as zlib's, ten times as fast
except ImportError:
    from zlib import crc32

__all__ = ["Sha256", "crc32", "fingerprint", "is_sha256", "sha256_bytes", "sha256_file", "sha256_stream"]

CHUNK_BYTES = 8 * 2**20

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal, as a pydantic type of records."""


def is_sha256(digest: object) -> bool:
    """Whether a value is a SHA-256 in lowercase hexadecimal, so that it may serve as a file name."""
    return isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_stream(file: IO[bytes], progress: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of an open file from its current position to its end, in hexadecimal.

    `progress` is called before each chunk is read.
    """
    digest = hashlib.sha256()
    progress()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        progress()
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return sha256_stream(file)


def fingerprint(value: Any) -> str:
    """SHA-256 of a plain value as canonical JSON (sorted keys), in hexadecimal.

    Raises ValueError for NaN and infinities, TypeError for values that JSON cannot represent.
    """
    return sha256_bytes(json.dumps(value, sort_keys=True, allow_nan=False).encode())
