"""References of all extractors of an evaluation, from splits of the data set or from .npz files."""

from collections.abc import Mapping
from pathlib import Path

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest
from fm_core.evaluation.features.extractor_set import ExtractorSet, keys_of
from fm_core.evaluation.reference import (
    Reference,
    ReferenceSplit,
    reference_from_npz,
    reference_task,
    store_references,
)
from fm_core.evaluation.reference_statistics import load_statistics
from fm_core.evaluation.resumable_parts import ResumableParts

PAIRWISE_METRICS = {"kernel_distance", "precision_recall"}
"""Metrics that need the features of individual reference images."""
REFERENCE = "features of the reference"


def reference_phases(settings: EvaluateSection, manifest: Manifest) -> dict[str, str]:
    """Splits that are references, each with the phase in which its images are read for all extractors."""
    references = dict.fromkeys(section.reference for section in settings.each_extractor())
    splits = [name for name in references if name in manifest.splits]
    return {name: f"{REFERENCE}, {name}" if number else REFERENCE for number, name in enumerate(splits)}


class References:
    """The reference of each extractor."""

    def __init__(self, root: str, manifest: Manifest, extractors: ExtractorSet) -> None:
        self.manifest, self.extractors = manifest, extractors
        self.phases = reference_phases(extractors.settings, manifest)
        self.splits = {
            number: ReferenceSplit(root, manifest, section, extractor)
            for number, (section, extractor) in enumerate(extractors.members)
            if section.reference in manifest.splits
        }

    def tasks(self) -> list[ResumableParts]:
        """Tasks that compute the statistics that are not stored yet, one for each split."""
        tasks = [reference_task(self._of(name), phase) for name, phase in self.phases.items()]
        return [task for task in tasks if task]

    def read(self, tasks: Mapping[str, ResumableParts]) -> list[Reference]:
        """Read all references; first store the results of `tasks`, by phase, which must be complete.

        Raises:
            UserError: as for `reference_from_npz`, under the key of the extractor concerned.
        """
        for name, phase in self.phases.items():
            if phase in tasks:
                store_references(self._of(name), tasks[phase])
        return [self._read(number) for number in range(len(self.extractors.members))]

    def _of(self, name: str) -> list[ReferenceSplit]:
        return [split for split in self.splits.values() if split.split == name]

    def _read(self, number: int) -> Reference:
        if number in self.splits:
            return self.splits[number].read(None)
        settings, extractor = self.extractors.members[number]
        needs_rows = bool(PAIRWISE_METRICS & set(settings.metrics))
        with keys_of(number):
            if number and needs_rows:
                # Metrics over pairs of a further extractor are absent if its statistics are without images.
                needs_rows = load_statistics(Path(settings.reference)).holds_images
            return reference_from_npz(settings, extractor, self.manifest, needs_rows)
