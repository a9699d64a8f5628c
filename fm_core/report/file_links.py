"""Links from a page to the files beside it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

MAX_LINKS = 2_000
"""Number of files above which the fullest folders are linked instead of their files."""
LOCK = "lock"
"""Name of a file that only coordinates processes, as do those whose names begin with a dot."""


@dataclass(frozen=True)
class FileLink:
    """A link to a file or folder."""

    name: str
    """Path relative to the page."""
    href: str
    """The path as a relative URL."""
    size: str
    """Size of a file, or number of files of a folder, for display."""


@dataclass(frozen=True)
class FileLinks:
    """Links to the files of a folder."""

    links: tuple[FileLink, ...]


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, in order, without locks and files that are being written."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name != LOCK
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def file_links(folder: Path, page: Path, size: Callable[[float], str]) -> FileLinks:
    """Link all files of a folder except the page.

    Args:
        folder: the folder of the page.
        page: the page itself.
        size: format of a number of bytes.

    Of more than MAX_LINKS files, those of the folders with most files are replaced with a link to the folder.
    """
    files = [path for path in files_below(folder) if path != page]
    by_folder: dict[Path, list[Path]] = {}
    for path in files:
        by_folder.setdefault(path.parent, []).append(path)
    count, folders = len(files), set[Path]()
    for parent in sorted(by_folder, key=lambda parent: len(by_folder[parent]), reverse=True):
        if count <= MAX_LINKS:
            break
        folders.add(parent)
        count -= len(by_folder[parent]) - 1
    return FileLinks(tuple(_links(folder, by_folder, folders, size))[:MAX_LINKS])


def _links(
    folder: Path, by_folder: dict[Path, list[Path]], folders: set[Path], size: Callable[[float], str]
) -> Iterator[FileLink]:
    for parent in sorted(by_folder):
        if parent in folders:
            name = parent.relative_to(folder).as_posix()
            yield FileLink(f"{name}/", _href(f"{name}/"), f"{len(by_folder[parent]):,} files")
            continue
        for path in by_folder[parent]:
            name = path.relative_to(folder).as_posix()
            # Names that are not UTF-8 cannot be written to the page as they are.
            shown = name.encode("utf-8", "replace").decode("utf-8")
            yield FileLink(shown, _href(name), size(path.stat().st_size))


def _href(name: str) -> str:
    # The leading ./ and the quoted colon prevent a file name from becoming the scheme of a URL.
    return f"./{quote(name, errors='surrogateescape')}"
