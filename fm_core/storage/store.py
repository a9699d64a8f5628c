"""A folder at an fsspec URL, written so that nothing half-written is ever seen under its own name."""

import errno
import hashlib
import io
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

from fm_core.errors import UnreachableError, UserError
from fm_core.storage.remote_file import RemoteFile

T = TypeVar("T")

CHUNK = 8 * 2**20
ATTEMPTS = 5
FIRST_DELAY_S = 0.2
# What is the user's to mend where files are written.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
# An object that is not there or a request that is wrong: never retried.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Their errors for a broken connection or a busy server are not all OSErrors.
REMOTE_LIBRARIES = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}


class Store:
    """Files of one folder; names are paths below it.

    Local folders are written by rename. On object stores an upload becomes visible when it is
    complete; as an interrupted client may still publish a truncated object, sizes are compared
    after each upload, and readers trust only files whose hash a later-written record holds.
    """

    def __init__(self, filesystem: Any, path: str, url: str, local: Path | None) -> None:
        self.filesystem = filesystem
        self.path = path
        self.url = url
        """How the folder is named to the user."""
        self.local = local
        """The folder, where it is on this machine."""

    @classmethod
    def at(cls, url: str, *below: str) -> "Store":
        """The folder `url`/`below`...; UserError for an unknown or unavailable protocol."""
        whole = "/".join((url.rstrip("/") or "/", *below))
        try:
            filesystem, path = cast(tuple[Any, str], fsspec.core.url_to_fs(whole))
        except (ValueError, ImportError) as error:
            raise UserError(f"{whole}: {error}") from None
        local = Path(path) if "file" in _protocols(filesystem) else None
        return cls(filesystem, path.rstrip("/"), whole, local)

    @property
    def shared(self) -> bool:
        """Whether other processes see the same folder."""
        return "memory" not in _protocols(self.filesystem)

    def full(self, name: str) -> str:
        """Path of a file in the file system's own terms."""
        return f"{self.path}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """The whole file; FileNotFoundError."""
        return cast(bytes, with_retries(lambda: self.filesystem.cat_file(self.full(name)), self._where(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file; fewer if it is shorter."""
        return cast(
            bytes,
            with_retries(
                lambda: self.filesystem.cat_file(self.full(name), start=start, end=stop), self._where(name)
            ),
        )

    def size(self, name: str) -> int | None:
        """Bytes of the file; None if it is not there."""
        try:
            return int(with_retries(lambda: self._fresh().info(self.full(name)), self._where(name))["size"])
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file directly in the folder, by name; empty if there is no folder."""
        try:
            rows = with_retries(lambda: self._fresh().ls(self.path, detail=True), self.url)
        except FileNotFoundError:
            return {}
        return {row["name"].rsplit("/", 1)[-1]: int(row["size"]) for row in rows if row["type"] == "file"}

    def folders(self) -> list[str]:
        """Names of the folders directly in the folder; empty if there is no folder."""
        try:
            rows = with_retries(lambda: self._fresh().ls(self.path, detail=True), self.url)
        except FileNotFoundError:
            return []
        found = (row["name"].rstrip("/").rsplit("/", 1)[-1] for row in rows if row["type"] == "directory")
        return sorted(found)

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading and seeking; FileNotFoundError, and UserError as with_retries."""
        if self.local:
            return (self.local / name).open("rb")
        file = RemoteFile(
            lambda: cast(IO[bytes], self.filesystem.open(self.full(name), "rb")),
            lambda action: with_retries(action, self._where(name)),
        )
        return cast(IO[bytes], io.BufferedReader(file))

    def sha256(self, name: str) -> str:
        """SHA-256 of a file's content, in hexadecimal; FileNotFoundError."""
        return with_retries(lambda: self._sha256(name), self._where(name))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        with self.staged(name) as (_, file):
            file.write(content)

    @contextmanager
    def staged(self, name: str) -> Generator[tuple[Path, IO[bytes]]]:
        """A local file to write; published under `name` if the block ends without an exception."""
        folder = self.local or _scratch()
        stage = (folder / name).parent / f".{Path(name).name}.{_owner()}.partial"
        try:
            stage.parent.mkdir(parents=True, exist_ok=True)
            with stage.open("w+b") as file:
                yield stage, file
                file.flush()
                os.fsync(file.fileno())
            self._publish(stage, name)
        except OSError as error:
            if error.errno in UNWRITABLE:
                raise UserError(
                    f"{error.filename or folder}: {error.strerror}; mend that and run it again"
                ) from None
            raise
        finally:
            with suppress(OSError):
                stage.unlink(missing_ok=True)

    def send(self, source: Path, name: str) -> None:
        """Copy a local file to an object store, where it replaces one of that name when it is whole."""
        assert not self.local, "a local folder is written by `staged`"
        self._upload(source, name)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and all below it; nothing happens if it is not there."""
        with suppress(FileNotFoundError):
            with_retries(lambda: self._fresh().rm(self.full(name), recursive=True), self._where(name))

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if it is not there."""
        with suppress(FileNotFoundError):
            with_retries(lambda: self.filesystem.rm_file(self.full(name)), self._where(name))

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a local path; FileNotFoundError. The caller gives a temporary path."""
        with_retries(lambda: self.filesystem.get_file(self.full(name), str(target)), self._where(name))

    def free_bytes(self) -> int | None:
        """Free space where the folder is, in bytes; None for an object store."""
        if not self.local:
            return None
        above = next(path for path in (self.local, *self.local.parents) if path.exists())
        return shutil.disk_usage(above).free

    def remove_stale_stages(self) -> None:
        """Delete what dead processes of this host left half-written."""
        folder = self.local or _scratch()
        for stage in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
            match = re.search(r"\.([^.]+)\.(\d+)\.[0-9a-f]{8}\.partial$", stage.name)
            if match and match[1] == _host() and not _alive(int(match[2])):
                stage.unlink(missing_ok=True)

    def _publish(self, stage: Path, name: str) -> None:
        if self.local:
            target = self.local / name
            stage.replace(target)
            sync(target.parent)
            return
        self._upload(stage, name)

    def _upload(self, source: Path, name: str) -> None:
        size = source.stat().st_size

        def upload() -> None:
            self.filesystem.put_file(str(source), self.full(name))
            found = int(self._fresh().info(self.full(name))["size"])
            if found != size:
                raise OSError(f"{self.url}/{name} holds {found} bytes after an upload of {size}")

        try:
            with_retries(upload, self._where(name))
        except FileNotFoundError as error:
            raise UserError(
                f"{self.url}: cannot be written to ({_told(error)}); is there such a bucket?"
            ) from None

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _fresh(self) -> Any:
        self.filesystem.invalidate_cache()
        return self.filesystem

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.open(name) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()


def with_retries(action: Callable[[], T], where: str) -> T:
    """Do it; after a passing trouble of the store again, with growing, jittered pauses.

    Raises, naming `where`, UnreachableError if it does not pass and UserError if the store refuses;
    FileNotFoundError.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FINAL as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise UserError(f"{where}: {_told(error)}; check the permissions or credentials") from None
        except Exception as error:
            if not _passing(error) or "Credentials" in type(error).__name__:
                if type(error).__module__.split(".")[0] in REMOTE_LIBRARIES:
                    raise UserError(f"{where}: {_told(error)}; the environment must hold them") from None
                raise
            if attempt == ATTEMPTS:
                raise UnreachableError(f"{where}: tried {ATTEMPTS} times: {_told(error)}") from error
        time.sleep(FIRST_DELAY_S * 2 ** (attempt - 1) * (0.5 + os.urandom(1)[0] / 255))
    raise AssertionError("unreachable")


def _passing(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return type(error).__module__.split(".")[0] in REMOTE_LIBRARIES


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _scratch() -> Path:
    folder = Path(tempfile.gettempdir()) / f"flow-matching-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _owner() -> str:
    return f"{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Have a file's content written to the disk; a folder's, which makes renames in it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
