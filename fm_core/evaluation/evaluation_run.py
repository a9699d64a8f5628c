"""All that one evaluation reads and makes: its images, extractor and reference, and the work they mean."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_core.config import EvaluateSection, RunConfig
from fm_core.data.manifest import Manifest, load_manifest
from fm_core.data.reader import ImageReader
from fm_core.errors import UserError
from fm_core.evaluation.dataset_likelihood import batch_bits, tightened
from fm_core.evaluation.features.classifier_features import RECIPE
from fm_core.evaluation.features.extractor import Extractor, OnStep, open_extractor
from fm_core.evaluation.features.inception import NO_WEIGHTS
from fm_core.evaluation.image_sources import ImageSource, outside, sampler, samples_of_a_run
from fm_core.evaluation.nfe_curve import curve_part, points
from fm_core.evaluation.reference import VERSION, Reference, ReferenceSplit, imported
from fm_core.evaluation.resumable_parts import ResumableParts, split_ranges
from fm_core.run.directory import RunDirectory, step_name
from fm_core.sampling.checkpoint_source import Model, checkpoint_step, load_model, weights_file
from fm_core.sampling.compiled_network import accelerated
from fm_core.sampling.sample_store import SampleSet, draw_of, protocol_of
from fm_core.storage.hashing import fingerprint
from fm_core.storage.local_paths import local_path
from fm_core.storage.store import Store

PAIRS = {"kernel_distance", "precision_recall"}
"""Metrics that compare images pair by pair."""
HELD_OUT_PART = 1_024
REFERENCE = "features of the reference"
SAMPLES = "features of the samples"
HELD_OUT = "features of held-out images"
CURVE = "solutions in few evaluations"
LIKELIHOOD = "bits per dimension of held-out images"
CHECK = "bits per dimension at tighter tolerances"
SOLVED = 500.0
"""About how long an image takes whose ODE is solved, in images whose features are read."""


class EvaluationRun:
    """One evaluation of a configuration."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Find model, samples and reference, and refuse what does not fit. Raises UserError."""
        self.config, self.device, self.settings = config, device, config.evaluate
        self.manifest = load_manifest(config.data.root, config.data.name)
        self.run = RunDirectory(config)
        check_extractors(self.settings)
        check_splits(self.settings, self.manifest)
        self.model, self.step = self._model()
        self.source = self._source()

    @property
    def of_model(self) -> bool:
        """Whether the images are a model's, which then has a likelihood and a cost too."""
        return self.settings.samples in (None, "sampler")

    @cached_property
    def key(self) -> str:
        """Name of the scores: that of the samples, and a hash of what judges them."""
        skipped = {"processes", "reference_out", "beside"}
        asked = self.settings.model_dump(mode="json", exclude=skipped)
        recipe = RECIPE if self.settings.features == "classifier" else None
        files = [
            _stamp(name) for name in (self.settings.features, self.settings.weights, self.settings.reference)
        ]
        of = [asked, self.source.identity, self.manifest.version, VERSION, recipe, files]
        judged_by = fingerprint(of)
        return f"{self.samples.key if self.samples else self.source.name}-{judged_by[:6]}"

    @property
    def folder(self) -> str:
        """Directory of the scores below evaluation: the step of a model, or `images`."""
        return step_name(self.step) if self.of_model else "images"

    @cached_property
    def samples(self) -> SampleSet | None:
        """The samples of the run that are meant; None for images from outside."""
        if self.model is None:
            return None
        return SampleSet(self.config, self.step, protocol_of(self.config, self.model.weights_sha256))

    def open(self, on_step: OnStep) -> None:
        """Load what reads the images; a classifier that is not there yet is trained."""
        data = self.config.data
        self.extractor: Extractor = open_extractor(
            self.settings, data.root, self.manifest, self.device, on_step
        )
        self.split = None
        if self.settings.reference in self.manifest.splits:
            self.split = ReferenceSplit(data.root, self.manifest, self.settings, self.extractor)

    @cached_property
    def works(self) -> dict[str, ResumableParts]:
        """The work by its phase, in the order it is done; `open` comes first."""
        found: list[ResumableParts | None] = [
            self.split.work(REFERENCE) if self.split else None,
            self._features(SAMPLES, "samples", self.source.ranges, self._sample_part),
            self._features(
                HELD_OUT, "held-out", split_ranges(self.held_out, HELD_OUT_PART), self._held_out_part
            ),
            *self._of_the_model(),
        ]
        return {work.phase: work for work in found if work}

    @cached_property
    def reference(self) -> Reference:
        """What the images are compared with; the work of its phase must be done."""
        if self.split:
            return self.split.read(self.works.get(REFERENCE))
        needs_rows = bool(PAIRS & set(self.settings.metrics))
        return imported(self.settings, self.extractor, self.manifest, needs_rows)

    @property
    def held_out(self) -> int:
        """Real held-out images that are scored like samples."""
        return min(self.settings.held_out_images, self.manifest.splits["val"].images)

    def expected(self) -> dict[str, float]:
        """About how long each phase takes, in images whose features are read."""
        images, named = sum(map(len, self.source.ranges)), self.settings.reference
        weights = {
            REFERENCE: float(self.manifest.splits[named].images if named in self.manifest.splits else 1),
            SAMPLES: images,
            HELD_OUT: self.held_out,
        }
        if self.model:
            likelihood, curve = self.settings.likelihood, self.settings.nfe_curve
            weights |= {
                LIKELIHOOD: SOLVED * likelihood.images * likelihood.draws,
                CHECK: SOLVED * likelihood.check_images,
                CURVE: SOLVED * curve.images,
            }
        return weights

    def finish(self) -> None:
        """Remove what was only on the way to the scores; bits/dim of single images stay."""
        for phase in (SAMPLES, HELD_OUT, CURVE):
            if phase in self.works:
                self.works[phase].remove()

    def _model(self) -> tuple[Model | None, int]:
        if not self.of_model:
            return None, 0
        step = checkpoint_step(self.config)
        model = load_model(weights_file(self.config, step), self.device)
        if model.data_version != self.manifest.version:
            raise UserError(
                f"{self.run.checkpoints} was trained on version {model.data_version[:12]} of the data; "
                f"{self.config.data.name} is now {self.manifest.version[:12]}"
            )
        return model, step

    def _source(self) -> ImageSource:
        if self.model and self.samples:
            if self.settings.samples == "sampler":
                # Its network may be made faster in place, which a likelihood in float32 must not notice.
                model = load_model(weights_file(self.config, self.step), self.device)
                fast = replace(model, network=accelerated(model.network, self.config.sample))
                return sampler(self.config, self.samples, fast, self.device)
            return samples_of_a_run(self.samples, self.model.image_shape)
        return outside(str(self.settings.samples), self.manifest)

    def _store(self, name: str) -> Store:
        return Store.at(self.run.samples, self.folder, f"scores-{name}")

    def _features(self, phase: str, name: str, ranges: list[range] | Any, make: Any) -> ResumableParts:
        return ResumableParts(phase, self._store(self.key), name, ranges, make)

    def _sample_part(self, number: int) -> Mapping[str, Tensor]:
        images, cost = self.source.read(number)
        content = self._read(images)
        return {**content, "cost": cost.tensor()} if cost else content

    def _held_out_part(self, number: int) -> Mapping[str, Tensor]:
        return self._read(self._real(split_ranges(self.held_out, HELD_OUT_PART)[number])[0])

    def _read(self, images: Tensor) -> dict[str, Tensor]:
        features, probabilities = self.extractor(images)
        given = {} if probabilities is None else {"probabilities": probabilities}
        return {"features": features, "digests": digests(images), **given}

    def _real(self, images: range) -> tuple[Tensor, Tensor]:
        with ImageReader(self.config.data.root, self.manifest, "val") as reader:
            return reader.read(np.arange(images.start, images.stop, dtype=np.int64))

    def _of_the_model(self) -> list[ResumableParts]:
        if self.model is None:
            return []
        model, seed, found = self.model, self.config.sample.seed, list[ResumableParts]()
        likelihood, curve = self.settings.likelihood, self.settings.nfe_curve
        images = min(likelihood.images, self.manifest.splits["val"].images)
        checked = min(likelihood.check_images, images)
        for phase, count, settings in (
            (LIKELIHOOD, images, likelihood),
            (CHECK, checked, tightened(likelihood)),
        ):
            if count:
                ranges = split_ranges(count, settings.batch)
                # The number of images is not part of it: asked for more, it goes on with what is there.
                how = settings.model_dump(mode="json", exclude={"images", "check_images"})
                of = fingerprint([model.weights_sha256, self.manifest.version, how, seed])[:12]

                def make(number: int, ranges: list[range] = ranges, settings: Any = settings) -> Any:
                    pixels, labels = self._real(ranges[number])
                    return batch_bits(model, pixels, labels, ranges[number], settings, seed, self.device)

                found.append(ResumableParts(phase, self._store(f"bits-{of}"), "bits", ranges, make))
        if curve.images:
            ranges = split_ranges(curve.images, self.config.sample.batch)

            def solve(number: int) -> Mapping[str, Tensor]:
                draw = draw_of(self.config)
                return curve_part(model, draw, curve, self.extractor, ranges[number], self.device)

            found.append(ResumableParts(CURVE, self._store(self.key), "curve", ranges, solve))
        return found


def check_extractors(settings: EvaluateSection) -> None:
    """Refuse at once what needs no data to be refused. Raises UserError."""
    if settings.features == "inception" and not settings.weights:
        raise UserError(NO_WEIGHTS)
    for key in ("weights", "weights_sha256"):
        if settings.features == "classifier" and getattr(settings, key):
            raise UserError(f"evaluate.{key}: the classifier is trained here and takes no weights")
    for key in ("weights", "reference"):
        name = getattr(settings, key)
        path = local_path(name) if name and name not in ("train", "val") else None
        if path and not path.exists():
            raise UserError(f"evaluate.{key}: {name} does not exist")
    if settings.nfe_curve.images:
        points(settings.nfe_curve)


def check_splits(settings: EvaluateSection, manifest: Manifest) -> None:
    """Refuse a data set without the real images that an evaluation needs. Raises UserError."""
    needed = {"val": "real held-out images are scored like samples"}
    if settings.features == "classifier":
        needed["train"] = "the classifier is trained on it"
    if settings.reference in ("train", "val"):
        needed[settings.reference] = "it is evaluate.reference"
    for split, why in needed.items():
        if split not in manifest.splits:
            raise UserError(
                f"data.name {manifest.name} has no split {split}, only {', '.join(manifest.splits)}: {why}; "
                "shard a source that has one"
            )


def _stamp(name: str | None) -> list[int] | None:
    """What tells that a file on this machine is another one than before."""
    path = Path(name or "")
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


def digests(images: Tensor) -> Tensor:
    """64 bits of a hash of each image's pixels, int64 [N]."""
    rows = images.cpu().contiguous().flatten(1).numpy()
    hashed = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.from_numpy(np.frombuffer(b"".join(hashed), dtype=np.int64).copy())
