"""Scores of one set of images relative to another set or to reference statistics, without a run."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest, Packing
from fm_core.data.sources.file_listing import printable
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor, OnStep
from fm_core.evaluation.features.extractor_set import keys_of, open_extractors, outputs_of
from fm_core.evaluation.further_scores import further_records
from fm_core.evaluation.image_files import LOSSY, DatasetImages, FileImages, ImageSet, open_images
from fm_core.evaluation.image_sources import digests
from fm_core.evaluation.metrics.feature_statistics import Gaussian, MomentAccumulator
from fm_core.evaluation.npz_images import npz_arrays
from fm_core.evaluation.protocol_scores import ScoredSet, balance_text, named_protocol, protocol_records
from fm_core.evaluation.reference import Reference, statistics_name, subset_indices
from fm_core.evaluation.reference_statistics import (
    StatisticsFile,
    check_dimension,
    check_provenance,
    load_statistics,
)
from fm_core.evaluation.references import PAIRWISE_METRICS, REFERENCE, References
from fm_core.evaluation.requirements import check_own_references
from fm_core.evaluation.resumable_parts import split_ranges
from fm_core.evaluation.scores import image_scores
from fm_core.run.directory import environment
from fm_core.storage.hashing import sha256_file
from fm_core.storage.local_paths import cache_home

PART_IMAGES = 1_024
SAMPLES = "features of the samples"
OnPart = Callable[[str, int, int], None]
"""Callback that receives the phase, the number of images finished, and the total number of images."""


class SetComparison:
    """Samples and a reference, which are opened and checked for consistency before any computation."""

    def __init__(self, settings: EvaluateSection, device: torch.device) -> None:
        """Open samples and reference. Raises UserError if images are missing, damaged or inconsistent."""
        assert settings.samples, "the caller has checked it"
        self.settings, self.device = settings, device
        self.samples = open_images(settings.samples, "evaluate.samples")
        self.path = Path(settings.reference)
        self.statistics = self._statistics()
        self.real: ImageSet | None = self._real_images()
        self.format = self._format()
        self._check_sizes()
        if self.real is None and not settings.given("metrics"):
            metrics = [name for name in settings.metrics if name not in PAIRWISE_METRICS]
            self.settings = settings.model_copy(update={"metrics": tuple(metrics)})
        if self.real is None and PAIRWISE_METRICS & set(self.settings.metrics):
            raise UserError(
                f"evaluate.reference {self.path} contains no images (arr_0): remove kernel_distance and "
                "precision_recall from evaluate.metrics"
            )

    def phases(self) -> dict[str, float]:
        """Number of images of each phase."""
        return {REFERENCE: float(self.real.count if self.real else 1), SAMPLES: float(self.samples.count)}

    def open(self, on_step: OnStep) -> None:
        """Open the feature extractors. Raises UserError if one does not match the images or statistics."""
        if self.settings.trains_classifier and not (self.format.class_count and self.format.shards):
            raise UserError(
                "evaluate.features classifier is trained on a data set with labels, and evaluate.reference "
                "is none: give --evaluate.features inception --evaluate.weights FILE, a TorchScript file, or "
                "package.module:Name"
            )
        root = self.dataset.root if self.dataset else str(cache_home() / "flow-matching-pipeline")
        self.extractors = open_extractors(self.settings, root, self.format, self.device, on_step)
        self.extractor: Extractor = self.extractors.main
        for number, (settings, extractor) in enumerate(self.extractors.members):
            if statistics := self.statistics[number]:
                path = Path(settings.reference)
                with keys_of(number):
                    check_provenance(path, statistics, extractor, None)
                    check_dimension(path, statistics, extractor, self.format)

    def scores(self, on_part: OnPart) -> dict[str, Any]:
        """Compute the scores and their protocol. Raises UserError for a damaged image."""
        references = self._references(on_part)
        reference = references[0]
        parts = list(self._outputs(self.samples, SAMPLES, on_part))
        scores = image_scores(
            parts, (), reference, self.extractor, self.settings, self.device, classes_in_turn=True
        )
        scores |= protocol_records(parts, reference, self.extractor, self.settings, self.device)
        scores |= further_records(self.extractors, parts, (), references, self.device, classes_in_turn=True)
        return {"protocol": self._protocol(parts, reference), **scores}

    @cached_property
    def dataset(self) -> DatasetImages | None:
        """Data set that determines the intensity levels: of the reference, or else of the samples."""
        sets = (each for each in (self.real, self.samples) if isinstance(each, DatasetImages))
        return next(sets, None)

    def _statistics(self) -> list[StatisticsFile | None]:
        """Statistics of the reference of each extractor; None if its reference consists of images."""
        first, *others = (Path(section.reference) for section in self.settings.each_extractor())
        statistics = [_read_statistics(first)]
        if statistics[0]:
            check_own_references(self.settings)
        for number, path in enumerate(others, start=1):
            with keys_of(number):
                statistics.append(_read_statistics(path))
                if statistics[number] is None and path != first:
                    raise UserError(
                        f"evaluate.reference {printable(str(path))}: a further extractor has the reference "
                        "of the first, or an .npz with mu and sigma"
                    )
        return statistics

    def _real_images(self) -> ImageSet | None:
        if self.settings.reference in ("train", "val"):
            raise UserError(
                f"evaluate.reference {self.settings.reference}: without --config, name a folder of images, "
                "an .npz file, tars, or the folder of a data set"
            )
        if self.statistics[0] and not self.statistics[0].holds_images:
            return None
        return open_images(self.settings.reference, "evaluate.reference")

    def _format(self) -> Manifest:
        """Shape and intensity levels of the images that the extractor receives."""
        if self.dataset:
            return self.dataset.manifest
        _, height, width = self.samples.shape
        return Manifest(
            name="images",
            levels=256,
            image_shape=(3, height, width),
            class_count=None,
            label_order="none",
            packing=Packing(block_images=1, shard_blocks=1),
            recipe={},
            splits={},
            shards=(),
        )

    def _check_sizes(self) -> None:
        sets = {"evaluate.samples": self.samples, "evaluate.reference": self.real}
        sizes = {key: each.shape[1:] for key, each in sets.items() if each}
        if len(set(sizes.values())) > 1:
            text = " and ".join(f"{key} of {width} x {height}" for key, (height, width) in sizes.items())
            raise UserError(
                f"{text} pixels: score images of one size; resize the larger ones before they are saved"
            )
        levels = {each.manifest.levels for each in sets.values() if each and each.manifest}
        if len(levels) > 1:
            text = " and ".join(map(str, sorted(levels)))
            raise UserError(f"evaluate.samples and evaluate.reference: data sets of {text} intensity levels")

    def _references(self, on_part: OnPart) -> list[Reference]:
        """Reference of each extractor: statistics, and features of the images that pairwise metrics need."""
        if isinstance(self.real, DatasetImages) and self.extractor.extract_spatial is None:
            return self._of_split(self.real, on_part)
        pairwise = bool(PAIRWISE_METRICS & set(self.settings.metrics))
        used = [number for number, statistics in enumerate(self.statistics) if statistics is None]
        used += [0] if pairwise and 0 not in used else []
        sums = self._read_reference(used, on_part) if used else {}
        return [self._of_statistics(number, sums) for number in range(len(self.statistics))]

    def _read_reference(
        self, used: Sequence[int], on_part: OnPart
    ) -> dict[tuple[int, str], MomentAccumulator]:
        """Accumulate the outputs of these extractors in one pass, by extractor and output."""
        assert self.real is not None, "pairwise metrics have been checked"
        chosen = subset_indices(self.real.count, self.settings.pair_images)
        sums: dict[tuple[int, str], MomentAccumulator] = {}
        for part in self._outputs(self.real, REFERENCE, on_part):
            for number in used:
                own = outputs_of(number, [part])[0] if number else part
                for name in ("features", "spatial"):
                    if name in own:
                        rows_only = self.statistics[number] is not None
                        accumulator = MomentAccumulator(chosen, rows_only=rows_only)
                        sums.setdefault((number, name), accumulator).add(own[name])
        return sums

    def _of_statistics(self, number: int, sums: Mapping[tuple[int, str], MomentAccumulator]) -> Reference:
        """Reference of an extractor, from its statistics or from the accumulated images."""
        read = sums.get((number, "features"))
        if statistics := self.statistics[number]:
            path = Path(self.extractors.members[number][0].reference)
            name = statistics_name(path, statistics.gaussian)
            return Reference(statistics.gaussian, read.rows if read else None, name, statistics.spatial)
        assert read is not None, "its images have been read"
        inner = sums.get((number, "spatial"))
        name = f"{printable(self.path.name)}, {read.moments.count} images"
        spatial = Gaussian.of(inner.moments) if inner else None
        return Reference(Gaussian.of(read.moments), read.rows, name, spatial)

    def _of_split(self, real: DatasetImages, on_part: OnPart) -> list[Reference]:
        """References from a data set's split; the statistics are stored beside the data set."""
        members = [
            (section.model_copy(update={"reference": real.split}), extractor)
            if statistics is None
            else (section, extractor)
            for (section, extractor), statistics in zip(self.extractors.members, self.statistics, strict=True)
        ]
        extractors = replace(self.extractors, members=members)
        references = References(real.root, real.manifest, extractors)
        tasks = references.tasks()
        for task in tasks:
            for number in task.missing():
                on_part(REFERENCE, task.ranges[number].start, task.images)
                task.run(number)
        return references.read({task.phase: task for task in tasks})

    def _outputs(self, images: ImageSet, phase: str, on_part: OnPart) -> Iterator[dict[str, Tensor]]:
        for part in split_ranges(images.count, PART_IMAGES):
            on_part(phase, part.start, images.count)
            pixels = self._fitted(images.read(part), phase)
            yield {**self.extractors.outputs(pixels), "digests": digests(pixels)}

    def _fitted(self, pixels: Tensor, phase: str) -> Tensor:
        """Convert images to the channels and intensity levels of the data set, if there is one."""
        key = "evaluate.samples" if phase == SAMPLES else "evaluate.reference"
        channels = self.format.image_shape[0]
        if channels == 3 and pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        if channels == 1 and pixels.shape[1] == 3:
            if not torch.equal(pixels, pixels[:, :1].expand_as(pixels)):
                raise UserError(f"{key}: images in color; those of {self.format.name} are gray")
            pixels = pixels[:, :1]
        if int(pixels.max()) >= self.format.levels:
            raise UserError(
                f"{key}: intensity levels up to {int(pixels.max())}; those of {self.format.name} are 0 .. "
                f"{self.format.levels - 1}"
            )
        return pixels.contiguous()

    def _protocol(self, parts: list[dict[str, Tensor]], reference: Reference) -> dict[str, Any]:
        versions = environment()["versions"]
        pixels = torch.cat([part["digests"] for part in parts]).sort().values.numpy()
        labels = self.samples.labels()
        counts = None if labels is None else np.unique(labels, return_counts=True)[1]
        facts, real = self.samples.facts(), self.real
        files: Mapping[str, int] = facts.get("files", {})
        statistics = self.statistics[0]
        kind = "statistics" if statistics else "images"
        scored = ScoredSet(
            images=self.samples.count,
            levels=self.format.levels,
            reference_kind=real.split if isinstance(real, DatasetImages) else kind,
            class_counts=None if counts is None else counts.tolist(),
            lossy={name: count for name, count in files.items() if name.startswith(LOSSY)},
        )
        _, height, width = self.samples.shape
        read = real.facts() if isinstance(real, FileImages) else {}
        return {
            **named_protocol(self.settings, self.extractor, reference, scored),
            **(self.dataset.facts() if self.dataset else {}),
            **facts,
            "samples": self.samples.kind,
            "images": self.samples.count,
            "image_size": f"{width} x {height}",
            **({"class_balance": balance_text(counts.tolist())} if counts is not None else {}),
            "samples_digest": hashlib.sha256(pixels.tobytes()).hexdigest()[:16],
            "reference": reference.name,
            **({"reference_sha256": sha256_file(self.path)} if self.path.is_file() else {}),
            **(
                {"reference_source": dict(statistics.provenance)}
                if statistics and statistics.provenance
                else {}
            ),
            **({"reference_files": read["files"]} if read else {}),
            "levels": self.format.levels,
            "features": self.extractor.name,
            "features_sha256": self.extractor.sha256,
            **self.extractor.protocol,
            "pair_images": self.settings.pair_images,
            "versions": {name: versions[name] for name in ("torch", "numpy") if name in versions},
        }


def _read_statistics(path: Path) -> StatisticsFile | None:
    """Read mu and sigma of an .npz file; None for images. Raises UserError if the file cannot be read."""
    if path.suffix.lower() != ".npz":
        return None
    if not path.exists() and "://" not in str(path):
        raise UserError(f"evaluate.reference: {printable(str(path))} does not exist")
    names = npz_arrays(path)
    return load_statistics(path) if {"mu", "sigma"} & set(names) or "arr_0" not in names else None
