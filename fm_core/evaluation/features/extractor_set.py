"""The extractors of one evaluation, which receive the same images: evaluate.features and evaluate.extractors.

Outputs of all extractors are stored under one dictionary per part of the images. Those of the first extractor
have their own names (`features`, ...); those of the further ones follow as `1.features`, `2.features`, ...
"""

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor, OnStep
from fm_core.evaluation.features.open_extractor import open_extractor

_KEYS = re.compile(r"\bevaluate\.(features|weights|weights_sha256|reference)\b")


@dataclass(frozen=True)
class ExtractorSet:
    """Extractors in the order of the configuration, with the settings of each."""

    settings: EvaluateSection
    members: Sequence[tuple[EvaluateSection, Extractor]]

    @property
    def main(self) -> Extractor:
        """The extractor of evaluate.features."""
        return self.members[0][1]

    @property
    def further(self) -> Iterator[tuple[int, EvaluateSection, Extractor]]:
        """Number, settings and extractor of each of evaluate.extractors; the first has the number 1."""
        return ((number, *member) for number, member in enumerate(self.members) if number)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of all extractors for images uint8 [N, C, S, S], by their stored names."""
        return {
            name: tensor
            for number, (_, extractor) in enumerate(self.members)
            for name, tensor in _stored(extractor.outputs(images), number)
        }


def _stored(outputs: Mapping[str, Tensor], number: int) -> Iterator[tuple[str, Tensor]]:
    return ((f"{number}.{name}" if number else name, tensor) for name, tensor in outputs.items())


def outputs_of(number: int, parts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Select the outputs of one further extractor from the stored parts, under the names of the first."""
    prefix = f"{number}."
    return [
        {name.removeprefix(prefix): tensor for name, tensor in part.items() if name.startswith(prefix)}
        for part in parts
    ]


def open_extractors(
    settings: EvaluateSection, root: str, manifest: Manifest, device: torch.device, on_step: OnStep
) -> ExtractorSet:
    """Build all extractors; the classifier last, so that an error of the others precedes its training.

    Raises:
        UserError: as for `open_extractor`, under the key of the extractor concerned; or two extractors have
            one name.
    """
    sections = settings.each_extractor()
    opened = dict[int, Extractor]()
    for number in sorted(range(len(sections)), key=lambda n: sections[n].features == "classifier"):
        with keys_of(number):
            opened[number] = open_extractor(sections[number], root, manifest, device, on_step)
    names = [opened[number].name for number in range(len(sections))]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(
                f"evaluate.extractors.{number - 1}: its features have the name {name} of another extractor, "
                "by which scores are recorded; use them in an evaluation of their own"
            )
    return ExtractorSet(settings, [(sections[number], opened[number]) for number in range(len(sections))])


@contextmanager
def keys_of(number: int) -> Generator[None]:
    """Let errors inside the block name the keys of the extractor: evaluate.extractors.0.weights for 1."""
    try:
        yield
    except UserError as error:
        if number == 0:
            raise
        raise UserError(_KEYS.sub(rf"evaluate.extractors.{number - 1}.\1", str(error))) from None
