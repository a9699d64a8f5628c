"""The images that a run trains on: those of its data set, or the pairs of a sample set (data.pairs)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fm_core.config import RunConfig
from fm_core.config.data import DataSection
from fm_core.data.loader_factories import make_cache, make_order
from fm_core.data.manifest import Manifest
from fm_core.data.reader import ImageReader, fair_order
from fm_core.data.sample_pairs import PairSet, open_pairs
from fm_core.data.sampler import Sampler
from fm_core.method.dequantization import Quantizer
from fm_core.models.build import Method
from fm_core.storage.keyed_random import CURRENT, Domain, GeneratorName, KeyedRandom
from fm_core.training.batch_source import BatchSource, PairNoise
from fm_core.training.engine import micro_batch_of
from fm_core.training.validation_loss import SEED, SequentialSampler, ValidationLoss


@dataclass(frozen=True)
class TrainingSet:
    """Training and validation images of a run, and the method that they are used with."""

    config: RunConfig
    method: Method
    dataset: Manifest
    """The data set of the configuration."""
    pairs: PairSet | None = None
    """The sample set that is trained on instead of the images of the data set."""

    @property
    def manifest(self) -> Manifest:
        """Where the images are."""
        return self.pairs.manifest if self.pairs else self.dataset

    @property
    def section(self) -> DataSection:
        """The data section, whose root and name are those of the images."""
        return self.pairs.section(self.config.data) if self.pairs else self.config.data

    @property
    def record(self) -> dict[str, Any]:
        """The entry of the pairs in a recipe; empty without pairs."""
        return {"pairs": self.pairs.record} if self.pairs else {}

    def training_source(self, ranks: int) -> BatchSource:
        """The batches to train on, in the order of data.order."""
        config = self.config
        seed, batch = config.run.seed, config.train.global_batch
        compiled = config.train.speed.compile
        return self._source(
            "train",
            make_order(self.section, self.manifest, "train", seed, batch, ranks),
            KeyedRandom(generator_of_run(config), seed, Domain.TRAINING, compiled),
            flip=config.data.horizontal_flip,
            label_dropout=config.train.label_dropout,
            null_label=self.dataset.class_count or 0,
        )

    def validation_loss(self, ranks: int) -> ValidationLoss | None:
        """The validation loss; None without validation images. That of pairs is measured on other pairs."""
        available = self.manifest.splits["val"].images if "val" in self.manifest.splits else 0
        images = min(self.config.train.validation_images, available)
        if not images:
            return None
        random = KeyedRandom(generator_of_run(self.config), SEED, Domain.HELD_OUT)
        source = self._source("val", SequentialSampler(self._validation_order(available)), random, flip=False)
        return ValidationLoss(source, images, micro_batch_of(self.config.train, ranks))

    def _validation_order(self, images: int) -> np.typing.NDArray[np.int64]:
        # Any part of the samples is representative: their noise is independent.
        return np.arange(images, dtype=np.int64) if self.pairs else fair_order(self.manifest, "val")

    def _source(self, split: str, order: Sampler, random: KeyedRandom, **options: Any) -> BatchSource:
        section, manifest = self.section, self.manifest
        dtype = self.pairs.dtype if self.pairs else torch.uint8
        return BatchSource(
            reader=ImageReader(section.root, manifest, split, make_cache(section, manifest), dtype),
            order=order,
            quantizer=Quantizer(manifest.levels),
            path=self.method.objective.path,
            coupling=self.method.coupling,
            times=self.method.times,
            random=random,
            pairs=self._noise(split, random.compiled),
            equal_times=self.method.objective.equal_times,
            **options,
        )

    def _noise(self, split: str, compiled: bool) -> PairNoise | None:
        pairs = self.pairs
        return pairs and PairNoise(pairs.random(compiled), pairs.first_index(split), pairs.dtype)


def training_set(config: RunConfig, manifest: Manifest, method: Method) -> TrainingSet:
    """The images to train on. Raises UserError for pairs that cannot be trained on."""
    return TrainingSet(config, method, manifest, pairs_of(config, manifest))


def pairs_of(config: RunConfig, manifest: Manifest) -> PairSet | None:
    """The sample set of data.pairs, None without the key; raises UserError as `open_pairs`."""
    if not config.data.pairs.samples:
        return None
    return open_pairs(config.data, manifest, generator_of_run(config), config.model.class_conditional)


def generator_of_run(config: RunConfig) -> GeneratorName:
    """The random generator of a run."""
    return config.run.generator or CURRENT
