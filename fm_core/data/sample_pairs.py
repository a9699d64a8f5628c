"""Pairs of noise and sample for reflow: a sample set, read as a data set without copying it.

A sample is a function of its noise, and its noise is a function of the set's seed and its index, so a sample
set is a set of pairs. Its tars are shards: a manifest in memory says where each image is in them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from fm_core.config.data import DataSection
from fm_core.config.derived_defaults import validation_images_for
from fm_core.data.manifest import Block, Manifest, Packing, Shard, Split
from fm_core.data.sample_shard import DONE, SCHEMA, SampleShard, listed_shards
from fm_core.errors import UserError
from fm_core.storage.hashing import fingerprint
from fm_core.storage.keyed_random import Domain, GeneratorName, KeyedRandom, generator_of
from fm_core.storage.store import Store

KEY = "data.pairs.samples"
LABEL_BYTES, CRC_BYTES = 8, 4


@dataclass(frozen=True)
class PairSet:
    """A complete sample set as training and validation pairs."""

    store: Store
    manifest: Manifest
    """Where the images are. Split val holds the last ones, train the others, in the order of their indices.
    Shape, levels and classes are those of the data set that the model of the samples was trained on."""
    dtype: torch.dtype
    """Type of the stored images: a float for the ends of trajectories, uint8 for intensity levels."""
    seed: int
    generator: GeneratorName
    record: dict[str, Any]
    """What identifies the pairs, for the recipe of weights: hash of the tars, and protocol of the samples."""

    def section(self, data: DataSection) -> DataSection:
        """The data section with the sample set in place of the data set."""
        root, _, name = self.store.url.rpartition("/")
        root = root or ("/" if self.store.url.startswith("/") else ".")
        return data.model_copy(update={"root": root, "name": name})

    def random(self, compiled: bool = False) -> KeyedRandom:
        """The generator of the noise; its position is the index of an image in the set."""
        return KeyedRandom(self.generator, self.seed, Domain.SAMPLES, compiled)

    def first_index(self, split: str) -> int:
        """Index in the set of the image with id 0 of a split."""
        return self.manifest.splits["train"].images if split == "val" else 0

    def check_files(self, hashes: bool = True) -> None:
        """Check sizes, and by default SHA-256, of the tars that training reads; the hashes read all of them.

        Raises UserError for the first that is missing or damaged.
        """
        sizes = self.store.sizes()
        for name, shard in {shard.name: shard for shard in self.manifest.shards}.items():
            if sizes.get(name) != shard.bytes or (hashes and self.store.sha256(name) != shard.sha256):
                raise UserError(
                    f"{KEY}: {self.store.url}/{name} is missing or damaged; run fm sample to make it again"
                )


def open_pairs(
    data: DataSection, manifest: Manifest, generator: GeneratorName, conditional: bool = False
) -> PairSet:
    """Open the sample set of data.pairs.

    Args:
        data: the data section.
        manifest: the data set of the configuration, on which the model of the samples must have been trained.
        generator: the random generator of the run, which must be that of the samples.
        conditional: whether training needs labels.

    Raises:
        UserError: there is not exactly one complete set, or it cannot be trained on (with the reason).
    """
    store = _locate(str(data.pairs.samples))
    done = _read_done(store)
    shards = listed_shards(done, f"{store.url}/{DONE}")
    protocol = done["protocol"]
    own = generator_of(protocol, f"{store.url}/{DONE}")
    if "stochastic" in protocol:
        raise UserError(
            f"{KEY}: the samples in {store.url} are of the stochastic solver {protocol.get('solver')}, so "
            "they are no function of their initial noise; sample with a deterministic solver"
        )
    if own != generator:
        raise UserError(
            f"{KEY}: the noise of {store.url} is of the generator {own}, this run's is {generator}; set "
            f"run.generator: {own}"
        )
    dtype = _dtype_of(store, shards)
    _check_shape(store, shards, manifest, dtype)
    if done.get("data_version") != manifest.version:
        raise UserError(
            f"{KEY}: the model of {store.url} was trained on version {str(done.get('data_version'))[:12]} of "
            f"its data; {data.name} is {manifest.version[:12]}; name that data set as data.root and data.name"
        )
    if conditional and any(shard.block.y_offset is None for shard in shards):
        raise UserError(
            f"{KEY}: the samples in {store.url} have no classes; set model.class_conditional: false, or "
            "sample a class-conditional model"
        )
    images = sum(shard.images for shard in shards)
    held_out = _validation_images(data, images)
    return PairSet(
        store=store,
        manifest=_manifest(store, shards, images - held_out, manifest),
        dtype=dtype,
        seed=int(protocol["seed"]),
        generator=own,
        record={
            "version": fingerprint([[file.name, file.sha256] for shard in shards for file in shard.files]),
            "validation_images": held_out,
            "step": done.get("step"),
            "protocol": protocol,
        },
    )


def _locate(url: str) -> Store:
    """The sample set at a URL, or the only one below it. Raises UserError."""
    top = Store.at(url)
    sets = [top] if _is_sample_set(top) else list(_sample_sets_below(top, depth=2))
    if not sets:
        raise UserError(f"{KEY} {url}: there is no sample set; run fm sample, or name its folder")
    if len(sets) > 1:
        names = ", ".join(each.url.removeprefix(f"{top.url}/") for each in sets)
        raise UserError(f"{KEY} {url}: there are {len(sets)} sample sets ({names}); name one of them")
    return sets[0]


def _sample_sets_below(store: Store, depth: int) -> Iterator[Store]:
    for name in store.folders():
        below = store.below(name)
        if _is_sample_set(below):
            yield below
        elif depth > 1:
            yield from _sample_sets_below(below, depth - 1)


def _is_sample_set(store: Store) -> bool:
    """Whether a folder holds samples, complete or not."""
    return any(name == DONE or name.startswith("samples-") for name in store.sizes())


def _read_done(store: Store) -> dict[str, Any]:
    try:
        done = json.loads(store.read_bytes(DONE))
        schema = done["schema"]
    except FileNotFoundError:
        raise UserError(f"{KEY}: {store.url} is not complete; run fm sample first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{KEY}: {store.url}/{DONE} is damaged; run fm sample to write it again") from None
    if schema != SCHEMA:
        raise UserError(f"{KEY}: {store.url}/{DONE}: schema {schema!r}; this program reads {SCHEMA}")
    return done


def _dtype_of(store: Store, shards: list[SampleShard]) -> torch.dtype:
    names = {shard.floats.dtype if shard.floats else "uint8" for shard in shards}
    if len(names) > 1:
        raise UserError(f"{KEY}: {store.url}/{DONE} is damaged; run fm sample to write it again")
    return {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}[names.pop()]


def _check_shape(store: Store, shards: list[SampleShard], manifest: Manifest, dtype: torch.dtype) -> None:
    expected = prod(manifest.image_shape) * dtype.itemsize
    for shard in shards:
        tar = shard.files[-1]
        if tar.block.x_bytes != expected * shard.images or tar.block.images != shard.images:
            shape = " x ".join(map(str, manifest.image_shape))
            raise UserError(
                f"{KEY}: the samples in {store.url} are not of the {shape} values of {manifest.name}; name "
                "the data set that their model was trained on as data.root and data.name"
            )


def _validation_images(data: DataSection, images: int) -> int:
    given = data.pairs.validation_images
    if given is not None and given >= images:
        raise UserError(
            f"data.pairs.validation_images {given}: of {images:,} pairs none would be left to train on"
        )
    return validation_images_for(images) if given is None else given


def _manifest(store: Store, shards: list[SampleShard], train_images: int, dataset: Manifest) -> Manifest:
    """The tars as shards; one with images of both splits is listed in both."""
    rows = {"train": range(train_images), "val": range(train_images, shards[-1].first + shards[-1].images)}
    splits = {split: indices for split, indices in rows.items() if indices}
    return Manifest(
        name=store.url.rpartition("/")[2],
        levels=dataset.levels,
        image_shape=dataset.image_shape,
        class_count=dataset.class_count,
        label_order=dataset.label_order,
        packing=Packing(block_images=max(shard.images for shard in shards), shard_blocks=1),
        recipe={"source": "samples"},
        splits={
            split: Split(images=len(indices), class_histogram=None, channel_mean=(), channel_std=())
            for split, indices in splits.items()
        },
        shards=tuple(
            part
            for split, indices in splits.items()
            for shard in shards
            if (part := _part(shard, split, indices)) is not None
        ),
    )


def _part(shard: SampleShard, split: str, indices: range) -> Shard | None:
    """The images of a tar with these indices, as a shard of a split; None if there are none."""
    begin, end = max(shard.first, indices.start), min(shard.first + shard.images, indices.stop)
    if begin >= end:
        return None
    tar, skipped, count = shard.files[-1], begin - shard.first, end - begin
    block, image_bytes = tar.block, tar.block.x_bytes // shard.images
    return Shard(
        name=tar.name,
        split=split,
        bytes=tar.bytes,
        sha256=tar.sha256,
        images=count,
        first_id=begin - indices.start,
        blocks=(
            Block(
                images=count,
                x_offset=block.x_offset + skipped * image_bytes,
                x_bytes=count * image_bytes,
                y_offset=None if block.y_offset is None else block.y_offset + skipped * LABEL_BYTES,
                y_bytes=None if block.y_offset is None else count * LABEL_BYTES,
                crc_offset=block.crc_offset + skipped * CRC_BYTES,
            ),
        ),
    )
