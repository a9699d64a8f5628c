"""Copies of remote shards on this node, named by their hash."""

import hashlib
import os
import tempfile
from pathlib import Path

from fm_core.data.manifest import Shard
from fm_core.data.store import CHUNK, Store
from fm_core.errors import UserError


class NodeCache:
    """A local folder of shards that the processes of a node share."""

    def __init__(self, folder: str | None = None) -> None:
        default = Path(tempfile.gettempdir()) / f"flow-matching-shards-{os.getuid()}"
        self.folder = Path(folder) if folder else default

    def local_path(self, store: Store, shard: Shard) -> Path:
        """Path of a whole copy of the shard; the shard itself where the store is on this machine.

        Raises UserError if what the store holds does not have the manifest's hash.
        """
        if store.local:
            return store.local / shard.name
        path = self.folder / f"{shard.sha256}.tar"
        if not path.exists():
            self._download(store, shard, path)
        return path

    def _download(self, store: Store, shard: Shard, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stage = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            store.fetch(shard.name, stage)
            if _sha256(stage) != shard.sha256:
                raise UserError(
                    f"{store.url}/{shard.name}: its SHA-256 is not the manifest's; run fm validate"
                )
            stage.replace(path)
        finally:
            stage.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
