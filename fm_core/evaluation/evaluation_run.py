"""One evaluation of a configuration: images, feature extractor, reference, and resumable tasks."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fm_core.config import RunConfig
from fm_core.data.cache import NodeCache
from fm_core.data.manifest import load_manifest
from fm_core.data.reader import ImageReader, fair_order, has_fair_order
from fm_core.errors import UserError
from fm_core.evaluation.dataset_likelihood import batch_bits, tighter_settings
from fm_core.evaluation.features.extractor import Extractor, OnStep
from fm_core.evaluation.features.extractor_set import open_extractors
from fm_core.evaluation.image_sources import (
    ImageSource,
    digests,
    external_images,
    run_samples,
    sampler_images,
)
from fm_core.evaluation.nfe_curve import curve_part
from fm_core.evaluation.reference import SUBSET_ORDER, Reference
from fm_core.evaluation.references import REFERENCE, References, reference_phases
from fm_core.evaluation.requirements import check_extractors, check_splits
from fm_core.evaluation.resumable_parts import ResumableParts, split_ranges
from fm_core.evaluation.scores_key import scores_key
from fm_core.run.directory import RunDirectory, step_name
from fm_core.sampling.checkpoint_source import (
    Model,
    check_run,
    checkpoint_step,
    job_weights,
    load_model,
    weights_file,
)
from fm_core.sampling.guide_model import accelerated_model, with_guide
from fm_core.sampling.sample_protocol import draw_of, protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.storage.hashing import fingerprint
from fm_core.storage.keyed_random import generator_record
from fm_core.storage.store import Store

VALIDATION_PART_IMAGES = 1_024
SAMPLES = "features of the samples"
VALIDATION = "features of the validation images"
CURVE = "ODE solutions of the NFE curve"
LIKELIHOOD = "bits per dimension of the validation images"
CHECK = "bits per dimension at tighter tolerances"
ODE_SOLVE_COST = 500.0
"""Approximate cost of solving the ODE of one image, in units of extracting the features of one image."""


class EvaluationRun:
    """One evaluation of a configuration."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        control: Path | None = None,
        job: str | None = None,
    ) -> None:
        """Open the model, samples and data set. Raises UserError if they are missing or do not match.

        Pass `control` and `job` on the ranks of a job: the weights are then pinned in the job's control
        directory, and the ranks fetch the manifest once per node.
        """
        self.config, self.device, self.settings = config, device, config.evaluate
        self.control = control
        place = config.data.root, config.data.name
        self.manifest = NodeCache(config.data.cache).manifest(*place, job) if job else load_manifest(*place)
        self.run = RunDirectory(config)
        check_extractors(self.settings)
        check_splits(self.settings, self.manifest)
        self.model, self.step = self._model()
        self.source = self._source()

    @property
    def of_model(self) -> bool:
        """Whether the images come from a model, which also has a likelihood and a sampling cost."""
        return self.settings.samples in (None, "sampler")

    @cached_property
    def key(self) -> str:
        """Name of the scores file: key of the samples, and hash of the scoring inputs except memorization."""
        samples = self.samples.key if self.samples else self.source.name
        order = self._order_identity()
        return scores_key(self.settings, samples, self.source.identity, self.manifest.version, order)

    @property
    def classes_in_turn(self) -> bool:
        """Whether the samples cycle through the classes, so that they must be shuffled before a split."""
        return self.of_model and self.config.sample.class_order == "in-turn"

    def _order_identity(self) -> list[str]:
        """Differences in image order from earlier versions, which give the scores another key."""
        samples = sum(map(len, self.source.ranges))
        reference = self.manifest.splits.get(self.settings.reference)
        subset = self.settings.pair_images < max(samples, reference.images if reference else 0)
        subset = subset or samples > self.validation_images
        unfair = not has_fair_order(self.manifest, "val")
        changes = {"samples": self.classes_in_turn, SUBSET_ORDER: subset, "validation": unfair}
        return [name for name, changed in changes.items() if changed]

    @property
    def folder(self) -> str:
        """Directory of the scores below evaluation/: the step of the model, or `images`."""
        return step_name(self.step) if self.of_model else "images"

    @cached_property
    def samples(self) -> SampleSet | None:
        """Samples of the run; None for external images."""
        if self.model is None:
            return None
        model = self.model
        protocol = protocol_of(self.config, model.weights_sha256, model.generator, model.guide_record)
        return SampleSet(self.config, self.step, protocol)

    def open(self, on_step: OnStep) -> None:
        """Open the feature extractors and references; train the classifier if it does not exist yet."""
        root, manifest = self.config.data.root, self.manifest
        self.extractors = open_extractors(self.settings, root, manifest, self.device, on_step)
        self.extractor: Extractor = self.extractors.main
        self._references = References(root, manifest, self.extractors)

    @cached_property
    def tasks(self) -> dict[str, ResumableParts]:
        """Resumable tasks by phase, in order of execution. Call `open` first."""
        tasks: list[ResumableParts | None] = [
            *self._references.tasks(),
            self._feature_task(SAMPLES, "samples", self.source.ranges, self._sample_part),
            self._feature_task(VALIDATION, "held-out", self._validation_ranges(), self._validation_part),
            *self._model_tasks(),
        ]
        return {task.phase: task for task in tasks if task}

    @property
    def reference(self) -> Reference:
        """Reference of evaluate.features."""
        return self.references[0]

    @cached_property
    def references(self) -> list[Reference]:
        """Reference of each extractor; the tasks that compute them must be complete."""
        return self._references.read(self.tasks)

    @property
    def validation_images(self) -> int:
        """Number of real validation images that are scored in the same way as samples."""
        return min(self.settings.held_out_images, self.manifest.splits["val"].images)

    def phase_costs(self) -> dict[str, float]:
        """Approximate cost of each phase, in units of extracting the features of one image."""
        images = float(sum(map(len, self.source.ranges)))
        phases, splits = reference_phases(self.settings, self.manifest), self.manifest.splits
        costs = {
            REFERENCE: 1.0,
            **{phase: float(splits[name].images) for name, phase in phases.items()},
            SAMPLES: images,
            VALIDATION: self.validation_images,
        }
        if self.model:
            likelihood, curve = self.settings.likelihood, self.settings.nfe_curve
            costs |= {
                LIKELIHOOD: ODE_SOLVE_COST * likelihood.images * likelihood.draws,
                CHECK: ODE_SOLVE_COST * likelihood.check_images,
                CURVE: ODE_SOLVE_COST * curve.images,
            }
        return costs

    def finish(self) -> None:
        """Remove intermediate results, except the bits/dim of individual images."""
        for phase in (SAMPLES, VALIDATION, CURVE):
            if phase in self.tasks:
                self.tasks[phase].remove()

    def _model(self) -> tuple[Model | None, int]:
        if not self.of_model:
            return None, 0
        if self.control:
            step, self.weights = job_weights(self.config, self.control)
        else:
            step = checkpoint_step(self.config)
            self.weights = weights_file(self.config, step)
        model = load_model(self.weights, self.device, self.config)
        if self.control is None:
            check_run(self.config, model, step)
        if model.data_version != self.manifest.version:
            raise UserError(
                f"{self.run.checkpoints} was trained on version {model.data_version[:12]} of the data; "
                f"{self.config.data.name} is now {self.manifest.version[:12]}"
            )
        return with_guide(model, self.config, self.device, self.control), step

    def _source(self) -> ImageSource:
        if self.model and self.samples:
            if self.settings.samples == "sampler":
                # The network may be optimized in place, which must not affect the float32 likelihood.
                model = load_model(self.weights, self.device, self.config)
                model = with_guide(model, self.config, self.device, self.control)
                sampling_model = accelerated_model(model, self.config.sample)
                return sampler_images(self.config, self.samples, sampling_model, self.device)
            return run_samples(self.samples, self.model.image_shape)
        return external_images(str(self.settings.samples), self.manifest)

    def _store(self, name: str) -> Store:
        return Store.at(self.run.samples, self.folder, f"scores-{name}")

    def _feature_task(
        self,
        phase: str,
        name: str,
        ranges: Sequence[range],
        make: Callable[[int], Mapping[str, Tensor]],
    ) -> ResumableParts:
        return ResumableParts(phase, self._store(self.key), name, ranges, make)

    def _validation_ranges(self) -> list[range]:
        return split_ranges(self.validation_images, VALIDATION_PART_IMAGES)

    def _sample_part(self, number: int) -> Mapping[str, Tensor]:
        images, cost = self.source.read(number)
        content = self._extract(images)
        return {**content, "cost": cost.to_tensor()} if cost else content

    def _validation_part(self, number: int) -> Mapping[str, Tensor]:
        return self._extract(self.read_validation(self._validation_ranges()[number])[0])

    def _extract(self, images: Tensor) -> dict[str, Tensor]:
        return {**self.extractors.outputs(images), "digests": digests(images)}

    @cached_property
    def _validation_order(self) -> NDArray[np.int64]:
        return fair_order(self.manifest, "val")

    def read_validation(self, images: range) -> tuple[Tensor, Tensor]:
        """Read validation images uint8 [n, C, S, S] and their labels, by position in the fair order."""
        with ImageReader(self.config.data.root, self.manifest, "val") as reader:
            return reader.read(self._validation_order[images.start : images.stop])

    def _model_tasks(self) -> list[ResumableParts]:
        if self.model is None:
            return []
        model, seed, tasks = self.model, self.config.sample.seed, list[ResumableParts]()
        likelihood, curve = self.settings.likelihood, self.settings.nfe_curve
        images = min(likelihood.images, self.manifest.splits["val"].images)
        check_images = min(likelihood.check_images, images)
        for phase, count, settings in (
            (LIKELIHOOD, images, likelihood),
            (CHECK, check_images, tighter_settings(likelihood)),
        ):
            if count:
                ranges = split_ranges(count, settings.batch)
                # The number of images is not part of the hash, so that existing parts are reused if it
                # increases.
                options = settings.model_dump(mode="json", exclude={"images", "check_images"})
                order = [] if has_fair_order(self.manifest, "val") else ["fair order"]
                generator = generator_record(model.generator).values()
                parts = [model.weights_sha256, self.manifest.version, options, seed, *order, *generator]
                key = fingerprint(parts)[:12]

                def make(number: int, ranges: list[range] = ranges, settings: Any = settings) -> Any:
                    pixels, labels = self.read_validation(ranges[number])
                    return batch_bits(model, pixels, labels, ranges[number], settings, seed, self.device)

                tasks.append(ResumableParts(phase, self._store(f"bits-{key}"), "bits", ranges, make))
        if curve.images:
            ranges = split_ranges(curve.images, self.config.sample.batch)

            def solve(number: int) -> Mapping[str, Tensor]:
                draw = draw_of(self.config)
                return curve_part(model, draw, curve, self.extractor, ranges[number], self.device)

            tasks.append(ResumableParts(CURVE, self._store(self.key), "curve", ranges, solve))
        return tasks
