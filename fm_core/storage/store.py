"""Folders at fsspec URLs. A file appears under its name only when it is complete."""

import errno
import io
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

from fm_core.errors import UserError
from fm_core.storage.atomic_files import create_exclusively, flush, publish
from fm_core.storage.hashing import sha256_stream
from fm_core.storage.local_paths import expand_home, is_relative_name
from fm_core.storage.remote_file import RemoteFile
from fm_core.storage.retries import one_line, with_retries
from fm_core.storage.staged_files import remove_stale, stage_of, staging_folder

T = TypeVar("T")

# Errors of a write that the user has to fix.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


class Store:
    """Files of one folder; names are paths relative to it.

    Local files are written by rename. On object stores an upload becomes visible when it is complete; because
    an interrupted client may still publish a truncated object, sizes are compared after each upload, and
    readers trust only files whose hash is in a record that is written later.

    All methods raise UserError if the store refuses the request and UnreachableError (a UserError) if it does
    not answer after several attempts.
    """

    def __init__(self, filesystem: Any, path: str, url: str, local: Path | None) -> None:
        self.filesystem = filesystem
        self.path = path
        self.url = url
        """URL of the folder, for messages."""
        self.local = local
        """Path of the folder if it is local, else None."""

    @classmethod
    def at(cls, url: str, *below: str) -> "Store":
        """Open the folder `url`/`below`...; ~ is expanded.

        Raises UserError for an unknown or unavailable protocol, and for a `below` that leaves the folder.
        """
        if url.startswith("~"):
            url = str(expand_home(url))
        for name in below:
            _require_below(url, name)
        full_url = "/".join((url.rstrip("/") or "/", *below))
        try:
            filesystem, path = cast(tuple[Any, str], fsspec.core.url_to_fs(full_url))
        except (ValueError, ImportError) as error:
            raise UserError(f"{full_url}: {error}") from None
        local = Path(path) if "file" in _protocols(filesystem) else None
        return cls(filesystem, path.rstrip("/"), full_url, local)

    def below(self, name: str) -> "Store":
        """The store of a subfolder."""
        local = self.local / name if self.local else None
        return Store(self.filesystem, f"{self.path}/{name}", f"{self.url}/{name}", local)

    @property
    def shared(self) -> bool:
        """Whether other processes see the same folder; false in memory."""
        return "memory" not in _protocols(self.filesystem)

    def _retry(self, action: Callable[[], T], where: str) -> T:
        """`with_retries`, reconnecting after an attempt without credentials, which clients cache."""

        def attempt() -> T:
            try:
                return action()
            except Exception as error:
                if type(error).__name__ == "NoCredentialsError" and hasattr(self.filesystem, "connect"):
                    with suppress(Exception):
                        self.filesystem.connect(refresh=True)
                raise

        return with_retries(attempt, where)

    def full(self, name: str) -> str:
        """Path of a file within the fsspec file system; UserError for a name outside of the folder."""
        _require_below(self.url, name)
        return f"{self.path}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """Content of a file. Raises FileNotFoundError."""
        return cast(bytes, self._retry(lambda: self.filesystem.cat_file(self.full(name)), self._where(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; fewer if it is shorter."""
        return cast(
            bytes,
            self._retry(
                lambda: self.filesystem.cat_file(self.full(name), start=start, end=stop), self._where(name)
            ),
        )

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if it does not exist."""
        try:
            return int(self._retry(lambda: self._fresh().info(self.full(name)), self._where(name))["size"])
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file directly in the folder, by name; empty if there is no folder."""
        try:
            rows = self._retry(lambda: self._fresh().ls(self.path, detail=True), self.url)
        except FileNotFoundError:
            return {}
        sizes = {row["name"].rsplit("/", 1)[-1]: int(row["size"]) for row in rows if row["type"] == "file"}
        return {name: size for name, size in sizes.items() if is_relative_name(name)}

    def folders(self) -> list[str]:
        """Sorted names of the subfolders; empty if there is no folder."""
        try:
            rows = self._retry(lambda: self._fresh().ls(self.path, detail=True), self.url)
        except FileNotFoundError:
            return []
        names = (row["name"].rstrip("/").rsplit("/", 1)[-1] for row in rows if row["type"] == "directory")
        # An object store may contain a key with a part "..", which this program never creates.
        return sorted(name for name in names if is_relative_name(name))

    def open(self, name: str) -> IO[bytes]:
        """Open a seekable file for reading. Raises FileNotFoundError."""
        if self.local:
            _require_below(self.url, name)
            return (self.local / name).open("rb")
        file = RemoteFile(
            lambda: cast(IO[bytes], self.filesystem.open(self.full(name), "rb")),
            lambda action: self._retry(action, self._where(name)),
        )
        return cast(IO[bytes], io.BufferedReader(file))

    def sha256(self, name: str) -> str:
        """SHA-256 of a file's content, in hexadecimal. Raises FileNotFoundError."""

        def read() -> str:
            with self.open(name) as file:
                return sha256_stream(file)

        return self._retry(read, self._where(name))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        with self.staged(name) as (_, file):
            file.write(content)

    @contextmanager
    def staged(self, name: str) -> Generator[tuple[Path, IO[bytes]]]:
        """Open a local file for writing; it is published as `name` if the block ends without an exception.

        Raises UserError if the file cannot be written: permissions, a full or read-only disk.
        """
        _require_below(self.url, name)
        folder = self.local or staging_folder()
        stage = stage_of(folder / name)
        try:
            stage.parent.mkdir(parents=True, exist_ok=True)
            with stage.open("w+b") as file:
                yield stage, file
                flush(file)
            self._publish(stage, name)
        except OSError as error:
            if error.errno in UNWRITABLE:
                raise UserError(
                    f"{error.filename or folder}: cannot write ({error.strerror}); fix the cause and rerun"
                ) from None
            raise
        finally:
            with suppress(OSError):
                stage.unlink(missing_ok=True)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it already exists; return whether it was written.

        Of several writers exactly one succeeds: by a hard link or O_EXCL on a disk, by a conditional request
        in a store that supports them. In any other store the file is read back.
        """
        if self.local:
            return create_exclusively(self.local / name, content)
        if self.size(name) is not None:
            return self.read_bytes(name) == content
        filesystem, path = self.filesystem, self.full(name)
        if not self._conditional(lambda: filesystem.pipe_file(path, content, mode="create"), name):
            self.write_bytes(name, content)
        return self.read_bytes(name) == content

    def send(self, source: Path, name: str) -> None:
        """Upload a local file to an object store, replacing an existing one atomically."""
        assert not self.local, "use `staged` for a local folder"
        self._upload(source, name)

    def send_new(self, source: Path, name: str, digest: str) -> None:
        """Upload a local file with this SHA-256 to an object store, under a name that does not exist yet.

        An existing file of the same content is kept; FileExistsError if the content differs.
        """
        if self.size(name) is None:
            filesystem, path = self.filesystem, self.full(name)
            if not self._conditional(lambda: filesystem.put_file(str(source), path, mode="create"), name):
                self._upload(source, name)
        if self.sha256(name) != digest:
            raise FileExistsError(f"{self.url}/{name} differs from what was sent")

    def move_folder(self, name: str, target: str) -> None:
        """Rename a folder of an object store: copy each file, then remove all. Raises FileNotFoundError."""
        source, where = self.full(name), self._where(name)
        files = cast(list[str], with_retries(lambda: self._fresh().find(source), where))
        if not files:
            raise FileNotFoundError(where)
        for path in files:
            copy = f"{self.full(target)}{path[len(source) :]}"
            with_retries(partial(self.filesystem.cp_file, path, copy), where)
        self.remove_folder(name)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and everything in it; no error if it does not exist."""
        with suppress(FileNotFoundError):
            self._retry(lambda: self._fresh().rm(self.full(name), recursive=True), self._where(name))

    def remove(self, name: str) -> None:
        """Remove a file; no error if it does not exist."""
        with suppress(FileNotFoundError):
            self._retry(lambda: self.filesystem.rm_file(self.full(name)), self._where(name))

    def fetch(self, name: str, target: Path) -> None:
        """Download a file to a local path, not atomically. Raises FileNotFoundError."""
        self._retry(lambda: self.filesystem.get_file(self.full(name), str(target)), self._where(name))

    def free_bytes(self) -> int | None:
        """Free disk space at the folder, in bytes; None for an object store."""
        if not self.local:
            return None
        above = next(path for path in (self.local, *self.local.parents) if path.exists())
        return shutil.disk_usage(above).free

    def remove_stale_stages(self) -> None:
        """Delete staged files of dead processes of this host."""
        remove_stale(self.local or staging_folder())

    def _conditional(self, write: Callable[[], Any], name: str) -> bool:
        """Make a conditional request that creates a file; False if the store does not support them."""
        try:
            with_retries(write, self._where(name))
        except (TypeError, ValueError, NotImplementedError):
            return False
        except OSError as error:
            if not isinstance(error, FileExistsError) and error.errno != errno.ENOSYS:
                raise
            return isinstance(error, FileExistsError)
        return True

    def _publish(self, stage: Path, name: str) -> None:
        if self.local:
            publish(stage, self.local / name)
            return
        self._upload(stage, name)

    def _upload(self, source: Path, name: str) -> None:
        size = source.stat().st_size

        def upload() -> None:
            self.filesystem.put_file(str(source), self.full(name))
            uploaded = int(self._fresh().info(self.full(name))["size"])
            if uploaded != size:
                raise OSError(f"{self.url}/{name} holds {uploaded} bytes after an upload of {size}")

        try:
            self._retry(upload, self._where(name))
        except FileNotFoundError as error:
            raise UserError(
                f"{self.url}: cannot be written to ({one_line(error)}); check that the bucket exists"
            ) from None

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _fresh(self) -> Any:
        self.filesystem.invalidate_cache()
        return self.filesystem


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _require_below(url: str, name: str) -> None:
    if name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise UserError(f"{url}: the name {name[:200]!r} is outside of this folder")
