"""Class order: renumbering the classes of a source by a label map (data.label_map).

The map is the devkit's map_clsloc.txt (lines "n02119789 1 kit_fox": WordNet id, 1-based class), which
gives the order of sorted WordNet ids, or a file with lines "old new", both 0-based.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fm_core.data.manifest import Input, Interpretation
from fm_core.data.sources.base import Classes, DataSource, PartStream, Samples, SourcePart
from fm_core.errors import UserError
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store


@dataclass(frozen=True)
class LabelMap:
    """Mapping from the classes of a source to new numbers."""

    table: NDArray[np.int64]
    """New class of each old class, int64 [old classes]."""
    order: str
    """Name of the new order."""
    sha256: str
    """SHA-256 of the file."""
    names: tuple[str, ...] | None = None
    """Names of the new classes, if the file has them."""


def read_label_map(url: str) -> LabelMap:
    """Read a label map; UserError if it is missing, malformed, or omits a class."""
    folder, _, name = url.rpartition("/")
    try:
        content = Store.at(folder or ".").read_bytes(name)
    except FileNotFoundError:
        raise UserError(f"data.label_map: {url} does not exist; give a file such as map_clsloc.txt") from None
    rows = [line.split() for line in content.decode(errors="replace").splitlines() if line.strip()]
    digest = sha256_bytes(content)
    if rows and all(len(row) >= 2 and re.fullmatch(r"n\d{8}", row[0]) and row[1].isdigit() for row in rows):
        names = tuple(sorted(row[0] for row in rows))
        pairs = {int(row[1]) - 1: names.index(row[0]) for row in rows}
        order = "sorted-wnid" if len(names) == 1000 else f"sorted-wnid-of-{len(names)}"
        return LabelMap(_table(pairs, url), order, digest, names)
    if not rows or any(len(row) != 2 or not (row[0].isdigit() and row[1].isdigit()) for row in rows):
        raise UserError(f'data.label_map: {url}: lines must be "n02119789 1 kit_fox" or "old new"')
    pairs = {int(old): int(new) for old, new in rows}
    return LabelMap(_table(pairs, url), f"label-map-{digest[:8]}", digest)


def _table(pairs: dict[int, int], url: str) -> NDArray[np.int64]:
    if sorted(pairs) != list(range(len(pairs))):
        raise UserError(f"data.label_map: {url}: the old classes must be 0 .. {len(pairs) - 1}, each once")
    return np.array([pairs[old] for old in range(len(pairs))], np.int64)


class RelabeledSource:
    """A source with its classes renumbered."""

    def __init__(self, source: DataSource, label_map: LabelMap) -> None:
        self._source, self._map = source, label_map
        added = {"label_map": label_map.sha256}
        earlier = source.facts.earlier_recipe
        self.facts = replace(
            source.facts,
            recipe={**source.facts.recipe, **added},
            earlier_recipe=None if earlier is None else {**earlier, **added},
        )

    def classes(self) -> Classes:
        """The new classes; UserError if the map and the source have different numbers of classes."""
        old = self._source.classes()
        if old.count != len(self._map.table):
            raise UserError(
                f"data.label_map: maps {len(self._map.table)} classes, the source has {old.count or 'none'}"
            )
        return Classes(int(self._map.table.max()) + 1, self._map.order, self._map.names)

    def interpretation(self) -> Interpretation:
        """As the source, with a note on the map."""
        interpretation = self._source.interpretation()
        return interpretation.model_copy(
            update={
                "remarks": (
                    *interpretation.remarks,
                    f"classes renumbered by data.label_map to {self._map.order}",
                )
            }
        )

    def parts(self) -> Sequence[SourcePart]:
        """As the source."""
        return self._source.parts()

    def inputs(self) -> Sequence[Input]:
        """As the source."""
        return self._source.inputs()

    def state(self) -> str:
        """As the source."""
        return self._source.state()

    def check_labels(self) -> None:
        """As the source."""
        self._source.check_labels()

    def release(self) -> None:
        """As the source."""
        self._source.release()

    def open(self, part: SourcePart) -> "RelabeledStream":
        """Open a part."""
        return RelabeledStream(self._source.open(part), self._map.table)


class RelabeledStream:
    """An open part with its classes renumbered."""

    def __init__(self, stream: PartStream, table: NDArray[np.int64]) -> None:
        self._stream, self._table = stream, table

    def skip(self, rows: int) -> None:
        """Skip the next rows."""
        self._stream.skip(rows)

    def read(self, rows: int) -> Samples:
        """Read the next rows."""
        samples = self._stream.read(rows)
        labels = None if samples.labels is None else self._table[samples.labels]
        return Samples(samples.images, labels, samples.rejected)

    def close(self) -> None:
        """Close the part."""
        self._stream.close()
