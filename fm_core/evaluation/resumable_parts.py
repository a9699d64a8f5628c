"""Work cut into numbered parts, each a file that is whole or not there.

What a part holds depends on its number alone, so that any number of processes may share a piece of work,
exchange nothing, be interrupted, and leave the same files: reading them in order gives the same numbers to
the last bit, whoever made them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fm_core.storage.store import Store


@dataclass(frozen=True)
class ResumableParts:
    """One piece of work over a range of images."""

    phase: str
    """What a person reads beside the bar."""
    store: Store
    name: str
    """Files are <name>-<first image>-<end>.safetensors."""
    ranges: Sequence[range]
    """The images of each part."""
    make: Callable[[int], Mapping[str, Tensor]]
    """The content of a part, by its number."""

    @property
    def images(self) -> int:
        """Images of all parts."""
        return sum(map(len, self.ranges))

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there."""
        there = self.store.sizes()
        return [number for number in range(len(self.ranges)) if self._file(number) not in there]

    def run(self, number: int) -> None:
        """Make a part and write it."""
        content = {name: tensor.contiguous() for name, tensor in self.make(number).items()}
        self.store.write_bytes(self._file(number), save(content))

    def read(self, number: int) -> dict[str, Tensor]:
        """The content of a part; one that is damaged is made again."""
        try:
            return load(self.store.read_bytes(self._file(number)))
        except (SafetensorError, FileNotFoundError):
            self.run(number)
            return load(self.store.read_bytes(self._file(number)))

    def read_all(self) -> list[dict[str, Tensor]]:
        """The content of every part, in order."""
        return [self.read(number) for number in range(len(self.ranges))]

    def remove(self) -> None:
        """Remove all parts."""
        for number in range(len(self.ranges)):
            self.store.remove(self._file(number))

    def _file(self, number: int) -> str:
        images = self.ranges[number]
        return f"{self.name}-{images.start:08d}-{images.stop:08d}.safetensors"


def split_ranges(images: int, part: int) -> list[range]:
    """0 .. images - 1 in ranges of `part`, the last one shorter."""
    return [range(first, min(first + part, images)) for first in range(0, images, part)]
