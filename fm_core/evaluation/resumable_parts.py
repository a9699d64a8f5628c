"""Resumable computation in numbered parts, each stored in one file that is written atomically.

The content of a part depends only on its number. Any number of processes can therefore share the work without
communication, and can be interrupted. The files, read in order, are identical to the last bit no matter which
processes computed them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fm_core.storage.store import Store


@dataclass(frozen=True)
class ResumableParts:
    """A computation over a range of images, split into parts."""

    phase: str
    """Description shown with the progress bar."""
    store: Store
    name: str
    """Prefix of the file names, which are <name>-<first image>-<end>.safetensors."""
    ranges: Sequence[range]
    """Range of images of each part."""
    make: Callable[[int], Mapping[str, Tensor]]
    """Compute the content of a part from its number."""

    @property
    def images(self) -> int:
        """Total number of images of all parts."""
        return sum(map(len, self.ranges))

    def missing(self) -> list[int]:
        """Numbers of the parts whose files do not exist."""
        existing = self.store.sizes()
        return [number for number in range(len(self.ranges)) if self._file(number) not in existing]

    def run(self, number: int) -> None:
        """Compute a part and write its file."""
        content = {name: tensor.contiguous() for name, tensor in self.make(number).items()}
        self.store.write_bytes(self._file(number), save(content))

    def read(self, number: int) -> dict[str, Tensor]:
        """Read a part; compute it again if its file is missing or damaged."""
        try:
            return load(self.store.read_bytes(self._file(number)))
        except (SafetensorError, FileNotFoundError):
            self.run(number)
            return load(self.store.read_bytes(self._file(number)))

    def read_all(self) -> list[dict[str, Tensor]]:
        """Read every part, in order."""
        return [self.read(number) for number in range(len(self.ranges))]

    def remove(self) -> None:
        """Remove the files of all parts."""
        for number in range(len(self.ranges)):
            self.store.remove(self._file(number))

    def _file(self, number: int) -> str:
        images = self.ranges[number]
        return f"{self.name}-{images.start:08d}-{images.stop:08d}.safetensors"


def split_ranges(images: int, part: int) -> list[range]:
    """Split 0 .. images - 1 into ranges of length `part`; the last one may be shorter."""
    return [range(first, min(first + part, images)) for first in range(0, images, part)]
