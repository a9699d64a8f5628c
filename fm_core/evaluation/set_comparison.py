"""Scores of one set of images relative to another set or to reference statistics, without a run."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
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
from fm_core.evaluation.features.open_extractor import open_extractor
from fm_core.evaluation.image_files import LOSSY, DatasetImages, FileImages, ImageSet, open_images
from fm_core.evaluation.image_sources import digests
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.npz_images import npz_arrays
from fm_core.evaluation.protocol_scores import ScoredSet, balance_text, named_protocol, protocol_records
from fm_core.evaluation.reference import Reference, ReferenceSplit, statistics_name, subset_indices
from fm_core.evaluation.reference_statistics import (
    StatisticsFile,
    check_dimension,
    check_provenance,
    load_statistics,
)
from fm_core.evaluation.resumable_parts import split_ranges
from fm_core.evaluation.scores import image_scores
from fm_core.run.directory import environment
from fm_core.storage.hashing import sha256_file
from fm_core.storage.local_paths import cache_home

PART_IMAGES = 1_024
SAMPLES, REFERENCE = "features of the samples", "features of the reference"
PAIRWISE = {"kernel_distance", "precision_recall"}
"""Metrics that need the images of the reference, not only their statistics."""
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
            metrics = [name for name in settings.metrics if name not in PAIRWISE]
            self.settings = settings.model_copy(update={"metrics": tuple(metrics)})
        if self.real is None and PAIRWISE & set(self.settings.metrics):
            raise UserError(
                f"evaluate.reference {self.path} contains no images (arr_0): remove kernel_distance and "
                "precision_recall from evaluate.metrics"
            )

    def phases(self) -> dict[str, float]:
        """Number of images of each phase."""
        return {REFERENCE: float(self.real.count if self.real else 1), SAMPLES: float(self.samples.count)}

    def open(self, on_step: OnStep) -> None:
        """Open the feature extractor. Raises UserError if it does not match the images or statistics."""
        if self.settings.features == "classifier" and not (self.format.class_count and self.format.shards):
            raise UserError(
                "evaluate.features classifier is trained on a data set with labels, and evaluate.reference "
                "is none: give --evaluate.features inception --evaluate.weights FILE, a TorchScript file, or "
                "package.module:Name"
            )
        root = self.dataset.root if self.dataset else str(cache_home() / "flow-matching-pipeline")
        self.extractor: Extractor = open_extractor(self.settings, root, self.format, self.device, on_step)
        if self.statistics:
            check_provenance(self.path, self.statistics, self.extractor, None)
            check_dimension(self.path, self.statistics, self.extractor, self.format)

    def scores(self, on_part: OnPart) -> dict[str, Any]:
        """Compute the scores and their protocol. Raises UserError for a damaged image."""
        reference = self._reference(on_part)
        parts = list(self._outputs(self.samples, SAMPLES, on_part))
        scores = image_scores(
            parts, (), reference, self.extractor, self.settings, self.device, classes_in_turn=True
        )
        scores |= protocol_records(parts, reference, self.extractor, self.settings, self.device)
        return {"protocol": self._protocol(parts, reference), **scores}

    @cached_property
    def dataset(self) -> DatasetImages | None:
        """Data set that determines the intensity levels: of the reference, or else of the samples."""
        sets = (each for each in (self.real, self.samples) if isinstance(each, DatasetImages))
        return next(sets, None)

    def _statistics(self) -> StatisticsFile | None:
        if self.path.suffix.lower() != ".npz":
            return None
        if not self.path.exists() and "://" not in self.settings.reference:
            raise UserError(f"evaluate.reference: {printable(str(self.path))} does not exist")
        names = npz_arrays(self.path)
        return load_statistics(self.path) if {"mu", "sigma"} & set(names) or "arr_0" not in names else None

    def _real_images(self) -> ImageSet | None:
        if self.settings.reference in ("train", "val"):
            raise UserError(
                f"evaluate.reference {self.settings.reference}: without --config, name a folder of images, "
                "an .npz file, tars, or the folder of a data set"
            )
        if self.statistics and not self.statistics.holds_images:
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

    def _reference(self, on_part: OnPart) -> Reference:
        """Statistics of the reference, and features of the reference images that pairwise metrics need."""
        if isinstance(self.real, DatasetImages) and self.extractor.extract_spatial is None:
            return self._of_split(self.real, on_part)
        pairwise = bool(PAIRWISE & set(self.settings.metrics))
        if self.statistics and not pairwise:
            name = statistics_name(self.path, self.statistics.gaussian)
            return Reference(self.statistics.gaussian, None, name, self.statistics.spatial)
        assert self.real is not None, "pairwise metrics have been checked"
        chosen = subset_indices(self.real.count, self.settings.pair_images)
        first, rows = 0, list[Tensor]()
        sums: dict[str, FeatureMoments] = {}
        for part in self._outputs(self.real, REFERENCE, on_part):
            count = len(part["features"])
            for name in ("features", "spatial") if not self.statistics else ():
                if name in part:
                    own = FeatureMoments.of(part[name])
                    sums[name] = sums[name] + own if name in sums else own
            inside = chosen[(chosen >= first) & (chosen < first + count)] - first
            rows.append(part["features"][inside])
            first += count
        if self.statistics:
            name, gaussian = statistics_name(self.path, self.statistics.gaussian), self.statistics.gaussian
            return Reference(gaussian, torch.cat(rows), name, self.statistics.spatial)
        spatial = Gaussian.of(sums["spatial"]) if "spatial" in sums else None
        own_name = f"{printable(self.path.name)}, {first} images"
        return Reference(Gaussian.of(sums["features"]), torch.cat(rows), own_name, spatial)

    def _of_split(self, real: DatasetImages, on_part: OnPart) -> Reference:
        """Statistics of a data set's split, which are stored beside the data set."""
        settings = self.settings.model_copy(update={"reference": real.split})
        split = ReferenceSplit(real.root, real.manifest, settings, self.extractor)
        task = split.task(REFERENCE)
        for number in task.missing() if task else ():
            assert task is not None, "it has parts"
            on_part(REFERENCE, task.ranges[number].start, task.images)
            task.run(number)
        return split.read(task)

    def _outputs(self, images: ImageSet, phase: str, on_part: OnPart) -> Iterator[dict[str, Tensor]]:
        for part in split_ranges(images.count, PART_IMAGES):
            on_part(phase, part.start, images.count)
            pixels = self._fitted(images.read(part), phase)
            yield {**self.extractor.outputs(pixels), "digests": digests(pixels)}

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
        kind = "statistics" if self.statistics else "images"
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
                {"reference_source": dict(self.statistics.provenance)}
                if self.statistics and self.statistics.provenance
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
