"""Node-local cache of remote shards, named by their SHA-256 and shared by all processes of the node."""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from fm_core.data.cache_quota import CacheQuota
from fm_core.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    load_manifest,
    parse_manifest,
    repair_command,
)
from fm_core.errors import UserError
from fm_core.storage.atomic_files import sync, write_text
from fm_core.storage.file_lock import file_lock
from fm_core.storage.hashing import sha256_bytes, sha256_file
from fm_core.storage.local_paths import expand_home, private_folder, private_temporary_folder
from fm_core.storage.store import Store

DOWNLOADS = 8
MANIFEST_SECONDS = 86_400.0
"""How long copies of manifests of other jobs are kept, in seconds."""


class NodeCache:
    """A local folder of shards.

    Processes that need the same shard wait for the one that downloads it. With a size limit, the least
    recently used shards are evicted (cache_quota.py); a process that has one open can still read it.
    """

    def __init__(self, folder: str | None = None, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._named = folder
        self._pool: ThreadPoolExecutor | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder, created with mode 0700; UserError if another user could write to it."""
        if self._named is None:
            return private_temporary_folder("flow-matching-shards", "data.cache")
        return private_folder(expand_home(self._named).resolve(), "data.cache to another folder")

    def manifest(self, root_url: str, name: str, job: str) -> Manifest:
        """The manifest of a data set, fetched once per node for all processes of a job; see `load_manifest`.

        Args:
            root_url: data.root.
            name: data.name.
            job: identifies the job; every job fetches the manifest again.
        """
        store = Store.at(root_url, name)
        if store.local:
            return load_manifest(root_url, name)
        where = f"{store.url}/{MANIFEST_NAME}"
        copy = self.folder / f"manifest-{sha256_bytes(f'{job} {where}'.encode())[:32]}.json"
        with file_lock(self.folder / "manifest.lock"):
            if not copy.exists():
                for old in self.folder.glob("manifest-*.json"):
                    if time.time() - old.stat().st_mtime > MANIFEST_SECONDS:
                        old.unlink(missing_ok=True)
                manifest = load_manifest(root_url, name)
                write_text(copy, manifest.to_json())
                return manifest
        return parse_manifest(copy.read_bytes(), where)

    def open(self, store: Store, shard: Shard) -> int:
        """Open a copy of the shard, or the shard itself in a local store; returns a file descriptor.

        A copy of the wrong size is downloaded again. Raises UserError if the shard is missing or, after
        a second download, does not have the manifest's SHA-256.
        """
        if not store.local:
            return self._open_copy(store, shard)
        try:
            return os.open(store.local / shard.name, os.O_RDONLY)
        except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
            # Other errors, e.g. too many open files or an unavailable file server, are not caused by the
            # shard.
            raise UserError(
                f"{store.url}/{shard.name}: {error.strerror}; run {repair_command(shard.name)} to write it "
                "again"
            ) from None

    def discard(self, store: Store, shard: Shard) -> None:
        """Remove the copy of a shard; does nothing for a local store."""
        if not store.local:
            path = self._path(shard)
            with file_lock(path.with_suffix(".lock")):
                path.unlink(missing_ok=True)

    def prefetch(self, store: Store, shards: Iterable[Shard]) -> None:
        """Start to download shards in the background; `open` raises the error of a failed download."""
        if store.local:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="shards")
        for shard in shards:
            self._pool.submit(self._prefetch, store, shard)

    def close(self) -> None:
        """Cancel downloads that have not started and wait for the others."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _open_copy(self, store: Store, shard: Shard) -> int:
        path = self._path(shard)
        with file_lock(path.with_suffix(".lock")):
            while True:
                try:
                    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                except FileNotFoundError:
                    self._download(store, shard, path)  # another process may evict it before it is opened
                    continue
                if os.fstat(file).st_size == shard.bytes:
                    os.utime(file)
                    return file
                os.close(file)
                path.unlink(missing_ok=True)

    def _prefetch(self, store: Store, shard: Shard) -> None:
        os.close(self._open_copy(store, shard))

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _download(self, store: Store, shard: Shard, path: Path) -> None:
        stage = path.with_suffix(".partial")
        with CacheQuota(self.folder, self.limit_bytes).reserved(path, shard.bytes):
            try:
                for _ in range(2):
                    store.fetch(shard.name, stage)
                    if sha256_file(stage) == shard.sha256:
                        sync(
                            stage
                        )  # otherwise a power loss could leave a truncated file under the final name
                        stage.replace(path)
                        return
            except FileNotFoundError:
                raise UserError(
                    f"{store.url}/{shard.name}: missing; run {repair_command(shard.name)}"
                ) from None
            finally:
                stage.unlink(missing_ok=True)
        raise UserError(
            f"{store.url}/{shard.name}: its SHA-256 is not the manifest's; run {repair_command(shard.name)}"
        )
