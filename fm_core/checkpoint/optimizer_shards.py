"""Shards of the optimizer's state in a checkpoint: one file per rank, with the elements that the rank held.

optimizer/00003-of-00008.safetensors contains float32 tensors such as "exp_avg/blocks.0.weight[0:512]": the
elements 0 to 511 of the flattened first moment of that parameter. Each element is in exactly one file, so any
number of ranks can resume. Earlier versions wrote one file per moment, optimizer/exp_avg.safetensors.
"""

import re
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fm_core.checkpoint.format import OPTIMIZER, RAW, tensors_file
from fm_core.checkpoint.tensor_layout import Fragment
from fm_core.errors import DamagedRecordError

_KEY = re.compile(r"(?P<moment>[^/]+)/(?P<name>.+)\[(?P<start>\d+):(?P<end>\d+)\]")


def is_sharded(part: str) -> bool:
    """Whether a part of a checkpoint is written in shards; the weights and averages are complete files."""
    return part.startswith(f"{OPTIMIZER}/")


def shard_name(rank: int, ranks: int) -> str:
    """Name of a rank's file of tensors."""
    return f"{OPTIMIZER}/{rank:05d}-of-{ranks:05d}"


def shard_tensors(parts: Sequence[str], fragments: Sequence[Fragment]) -> dict[str, Tensor]:
    """The tensors in a rank's file without content: its fragments of each part, in order."""
    return {
        f"{part.removeprefix(f'{OPTIMIZER}/')}/{fragment.name}[{fragment.start}:"
        f"{fragment.start + fragment.count}]": torch.empty(fragment.count, device="meta")
        for part in parts
        for fragment in fragments
    }


def problem_of_part(directory: Path, part: str) -> str | None:
    """What a local checkpoint lacks of a part, which is one file or complete shards; None if nothing."""
    if (directory / tensors_file(part)).exists():
        return None
    if not is_sharded(part) or not _files(directory):
        return f"no {tensors_file(part)}"
    try:
        with opened_shards(directory, part) as shards:
            return shards.problem()
    except (DamagedRecordError, SafetensorError, OSError) as error:
        return str(error)


@contextmanager
def opened_shards(directory: Path, part: str) -> Generator["OptimizerShards"]:
    """Open the shards of a part of a local checkpoint. DamagedRecordError if one of them is missing."""
    files = _files(directory)
    expected = [directory / tensors_file(shard_name(rank, len(files))) for rank in range(len(files))]
    if not files or files != expected:
        names = ", ".join(path.name for path in files) or "none"
        raise DamagedRecordError(f"{directory / OPTIMIZER}: a shard of every rank is expected, not {names}")
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        weights = stack.enter_context(safe_open(directory / tensors_file(RAW), framework="pt"))
        yield OptimizerShards(directory, weights, _index(handles, part.removeprefix(f"{OPTIMIZER}/")))


@dataclass(frozen=True)
class OptimizerShards:
    """Shards of one moment in open files."""

    directory: Path
    _weights: Any
    """The open file of the weights, from which the shapes are read."""
    _index: dict[str, list[tuple[int, int, Any, str]]]
    """Start, end, open file and key of each fragment by name of the parameter, in order."""

    def get_tensor(self, name: str) -> Tensor:
        """The complete moment of a parameter. DamagedRecordError if the shards do not have every element."""
        if problem := self._missing(name):
            raise DamagedRecordError(problem)
        value = torch.empty(self._weights.get_slice(name).get_shape(), dtype=torch.float32)
        flat = value.view(-1)
        for start, end, file, key in self._index[name]:
            flat[start:end] = file.get_tensor(key)
        return value

    def problem(self) -> str | None:
        """The first element that the shards do not have; None if they have every element."""
        return next(filter(None, map(self._missing, self._weights.keys())), None)

    def _missing(self, name: str) -> str | None:
        end_of_last = 0
        for start, end, _, _ in self._index.get(name, []):
            if start != end_of_last:
                break
            end_of_last = end
        if end_of_last != prod(self._weights.get_slice(name).get_shape()):
            return f"{self.directory / OPTIMIZER} has no element {end_of_last} of {name}"
        return None


def _files(directory: Path) -> list[Path]:
    return sorted(directory.joinpath(OPTIMIZER).glob("*-of-*.safetensors"))


def _index(handles: Sequence[Any], moment: str) -> dict[str, list[tuple[int, int, Any, str]]]:
    index: dict[str, list[tuple[int, int, Any, str]]] = {}
    for handle in handles:
        for key in handle.keys():  # noqa: SIM118
            match = _KEY.fullmatch(key)
            if match and match["moment"] == moment:
                fragment = int(match["start"]), int(match["end"]), handle, key
                index.setdefault(match["name"], []).append(fragment)
    for fragments in index.values():
        fragments.sort(key=lambda fragment: fragment[0])
    return index
