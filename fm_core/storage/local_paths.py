"""Local paths of URLs, relative names, and folders that no other user can write to."""

import os
import pwd
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from fm_core.errors import DamagedRecordError, UserError


def local_path(url: str) -> Path | None:
    """The local path of a file:// URL or a plain path, ~ expanded; None for any other URL."""
    path = url.removeprefix("file://")
    return None if "://" in path else expand_home(path)


def expand_home(path: str | Path) -> Path:
    """The path with a leading ~ replaced by the home directory; UserError if that is not known."""
    if not str(path).startswith("~"):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: the home directory is not known ({error}); set HOME or write the path in full"
        ) from None


def is_relative_name(name: str) -> bool:
    """Whether a name stays below its folder: relative, without "..", ".", and empty parts."""
    parts = name.split("/")
    return "\0" not in name and not {"", ".", ".."} & set(parts)


def require_relative_name(name: object, where: str) -> str:
    """Check that a name that was read from a store or a record stays below its folder, and return it.

    Args:
        name: the name as it was read; anything but a string is refused.
        where: the file that it was read from, for the message.

    Raises:
        DamagedRecordError: the name is absolute, has a part "..", or is not a string.
    """
    if not isinstance(name, str) or not is_relative_name(name):
        raise DamagedRecordError(
            f"{where}: the name {str(name)[:200]!r} is outside of its folder; the record was rejected"
        )
    return name


def _relative_name(name: str) -> str:
    if not is_relative_name(name):
        raise ValueError(f"{name[:200]!r} is not a relative name without '..'")
    return name


RelativeName = Annotated[str, AfterValidator(_relative_name)]
"""A name in a record of a store, as a pydantic type."""


def private_folder(folder: Path, key: str) -> Path:
    """Create a folder with mode 0700 if it is missing, and check that no other user can write to it.

    Args:
        folder: the folder; a symbolic link in its place is refused.
        key: the setting that names another folder, for messages.

    Raises:
        UserError: it belongs to another user, others can write to it, or it cannot be created.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror}); set {key}") from None
    if not stat.S_ISDIR(facts.st_mode):
        raise UserError(f"{folder} is not a directory of its own; remove it or set {key}")
    if facts.st_uid != os.geteuid():
        raise UserError(f"{folder} belongs to uid {facts.st_uid}, not to uid {os.geteuid()}; set {key}")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"{folder} can be written to by other users; chmod 700 it or set {key}")
    return folder


def private_temporary_folder(name: str, key: str = "TMPDIR") -> Path:
    """The folder `<name>-<uid>` for temporary files, below XDG_CACHE_HOME if that is set, else in TMPDIR.

    Its mode becomes 0700. Raises UserError as `private_folder`.
    """
    above = os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()
    folder = private_folder(expand_home(above) / f"{name}-{os.getuid()}", key)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def provide_home() -> None:
    """Provide a home directory and a user name to libraries if this user has none.

    Containers often run under an arbitrary uid without a passwd entry; torch, triton and others then fail
    with a KeyError. HOME becomes a folder from `private_temporary_folder`. Raises UserError.
    """
    try:
        pwd.getpwuid(os.getuid())
        known = True
    except KeyError:
        known = False
        if not os.environ.get("LOGNAME") and not os.environ.get("USER"):
            os.environ["USER"] = f"uid-{os.getuid()}"
    home = os.environ.get("HOME")
    if known if not home else Path(home).is_dir() and (home != "/" or os.access(home, os.W_OK)):
        return
    os.environ["HOME"] = str(private_temporary_folder("flow-matching-home", "HOME"))


def cache_home() -> Path:
    """Folder for files that are kept between runs: XDG_CACHE_HOME, ~/.cache, or in TMPDIR without a home."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return expand_home(named)
    try:
        home = Path.home()
    except RuntimeError:
        return private_temporary_folder("flow-matching-cache")
    # Users without a passwd entry or a home of their own often get "/".
    if home == Path("/") or not os.access(home, os.W_OK):
        return private_temporary_folder("flow-matching-cache")
    return home / ".cache"


def find_modules_here() -> None:
    """Let `package.module:Class` name a module of the working directory, as in the ranks (`python -m`).

    The directory goes last on the path, so that no file in it shadows an installed package.
    """
    with suppress(OSError):  # the directory was removed
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)
