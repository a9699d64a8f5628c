"""CIFAR-10, the python archive: cifar-10-python.tar.gz or the folder cifar-10-batches-py."""

import io
import tarfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Input, Interpretation
from fm_core.data.sources.base import ArrayStream, Classes, SourceFacts, SourcePart
from fm_core.data.sources.file_listing import list_files
from fm_core.data.sources.npz_members import damage_message
from fm_core.data.sources.pickles import load_arrays
from fm_core.errors import UserError
from fm_core.storage.store import Store

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "val": ("test_batch",)}
PUBLISHED = {"train": 50_000, "val": 10_000}
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)


class Cifar10Source:
    """CIFAR-10, loaded into memory (185 MB)."""

    def __init__(self, config: DataSection) -> None:
        if not config.source.url:
            raise UserError("data.source.url: required by data.source.format cifar10")
        if config.source.image_size not in (None, 32):
            raise UserError(
                f"data.source.image_size: {config.source.image_size}; images of CIFAR-10 have 32 pixels"
            )
        self._store = Store.at(config.source.url)
        self._partial = config.source.allow_partial
        self._loaded: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]] | None = None
        self._inputs: tuple[Input, ...] = ()
        self.facts = SourceFacts(
            levels=256,
            image_shape=SHAPE,
            recipe={"source": "cifar10", "allow_partial": self._partial},
            images=None if self._partial else sum(PUBLISHED.values()),
        )

    def classes(self) -> Classes:
        """The ten classes, in the order of batches.meta."""
        return Classes(10, "cifar10", NAMES)

    def interpretation(self) -> Interpretation:
        """The batches of the archive."""
        return Interpretation(
            splits="train from the data batches, val from the test batch",
            classes=f"10: {', '.join(NAMES)}",
            order="as published",
            own_validation=True,
            fair_order=not self._partial,
        )

    def parts(self) -> tuple[SourcePart, ...]:
        """One part for each split, counted."""
        parts = tuple(SourcePart(split, split, len(arrays[1])) for split, arrays in self._load().items())
        for part in parts:
            if part.rows != PUBLISHED[part.split] and not self._partial:
                raise UserError(
                    f"data.source.url: {self._store.url} holds {part.rows:,} {part.split} images, CIFAR-10 "
                    f"{PUBLISHED[part.split]:,}; set data.source.allow_partial to accept it"
                )
        return parts

    def inputs(self) -> tuple[Input, ...]:
        """The archive or the batches."""
        self._load()
        return self._inputs

    def state(self) -> str:
        """Empty, because `inputs` identifies the files by content."""
        return ""

    def check_labels(self) -> None:
        """Do nothing: labels are checked when they are loaded."""

    def open(self, part: SourcePart) -> ArrayStream:
        """The images of a split."""
        return ArrayStream(*self._load()[part.split])

    def release(self) -> None:
        """Does nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def _load(self) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        if self._loaded is None:
            files = self._files()
            self._loaded = {
                split: _join([_arrays(files[name], f"{self._store.url}/{name}") for name in names])
                for split, names in BATCHES.items()
            }
        return self._loaded

    def _files(self) -> dict[str, bytes]:
        """Content of the batches by name."""
        files = list_files(self._store, depth=2)
        batches = [name for names in BATCHES.values() for name in names]
        for prefix in ("", f"{FOLDER}/"):
            if all(prefix + name in files for name in batches):
                self._inputs = tuple(
                    Input(
                        name=prefix + name,
                        bytes=files[prefix + name],
                        digest=f"sha256:{self._store.sha256(prefix + name)}",
                    )
                    for name in batches
                )
                return {name: self._store.read_bytes(prefix + name) for name in batches}
        if ARCHIVE not in files:
            raise UserError(
                f"data.source.url: no {ARCHIVE} (or {FOLDER}/data_batch_1) under {self._store.url}; download "
                "it from https://www.cs.toronto.edu/~kriz/cifar.html and put it there"
            )
        digest = f"sha256:{self._store.sha256(ARCHIVE)}"
        self._inputs = (Input(name=ARCHIVE, bytes=files[ARCHIVE], digest=digest),)
        return self._extracted(batches)

    def _extracted(self, batches: list[str]) -> dict[str, bytes]:
        content: dict[str, bytes] = {}
        try:
            with self._store.open(ARCHIVE) as file, tarfile.open(fileobj=file, mode="r:gz") as archive:
                for member in archive:
                    name = member.name.rsplit("/", 1)[-1]
                    stream = archive.extractfile(member) if name in batches else None
                    if stream is not None:
                        content[name] = stream.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(damage_message(self._store, ARCHIVE, error)) from None
        missing = [name for name in batches if name not in content]
        if missing:
            raise UserError(damage_message(self._store, ARCHIVE, KeyError(missing[0])))
        return content


def _arrays(content: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [n, 3, 32, 32] and labels int64 [n] of a batch."""
    table = load_arrays(io.BytesIO(content), where)
    try:
        data = np.asarray(table["data"])
        labels = np.asarray(table["labels"], np.int64)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: has no data and labels ({error}); download it again") from None
    if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not len(labels):
        raise UserError(f"{where}: data is {data.dtype} {list(data.shape)}, not uint8 [n, 3072]")
    if labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{where}: labels are {labels.min()} .. {labels.max()}, not 0 .. 9")
    return data.reshape(-1, *SHAPE), labels


def _join(
    batches: list[tuple[NDArray[np.uint8], NDArray[np.int64]]],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return np.concatenate([images for images, _ in batches]), np.concatenate(
        [labels for _, labels in batches]
    )
