"""Local paths behind URLs."""

from pathlib import Path


def local_path(url: str) -> Path | None:
    """The path that a file:// URL or a plain path names; None for any other URL."""
    path = url.removeprefix("file://")
    return None if "://" in path else Path(path)
