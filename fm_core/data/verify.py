"""Verification of a written data set against its manifest, and of the manifest against its source.

quick: every shard and its sidecar exist and have the right size. default: every SHA-256, the names and
offsets of the members, the label histogram. deep: also the CRC of every image, the range of intensities,
duplicate images, and whether the source still produces the same bytes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import numpy as np

from fm_core.config.data import DataSection
from fm_core.data.manifest import Manifest, load_manifest
from fm_core.data.shard_format import ShardFile
from fm_core.data.shard_inspection import ShardContent, inspect_shard
from fm_core.data.shard_plan import ShardPlan, make_plan
from fm_core.data.shard_sidecar import read_sidecars
from fm_core.errors import UserError
from fm_core.storage.store import Store

Depth = Literal["quick", "default", "deep"]
OnImages = Callable[[int], None]
VALIDATION_SCHEMA = 1


@dataclass
class Validation:
    """Result of a verification."""

    depth: Depth
    """Depth of the verification."""
    problems: dict[str, str] = field(default_factory=dict)
    """Problems by file name."""
    notes: list[str] = field(default_factory=list)
    """Notes that are not problems of the files."""
    images: int = 0
    """Number of images checked."""

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps({"schema_version": VALIDATION_SCHEMA, **vars(self)}, indent=1) + "\n"


def validate_dataset(
    config: DataSection, depth: Depth = "default", on_images: OnImages = lambda done: None
) -> Validation:
    """Verify the data set of the configuration; UserError if it has no manifest.

    Depth deep compares with the source if it is still available.
    """
    manifest = load_manifest(config.root, config.name)
    store = Store.at(config.root, config.name)
    validation = validate_manifest(store, manifest, depth, on_images)
    if depth == "deep":
        _compare_with_source(store, manifest, config, validation)
    return validation


def validate_manifest(
    store: Store, manifest: Manifest, depth: Depth, on_images: OnImages = lambda done: None
) -> Validation:
    """Verify the files of a manifest."""
    validation = Validation(depth, damaged_sizes(store, manifest))
    if depth == "quick":
        sidecars = read_sidecars(store, [shard.name for shard in manifest.shards])
        for shard in manifest.shards:
            if shard.name not in sidecars and shard.name not in validation.problems:
                validation.problems[shard.name] = "its sidecar is missing"
        validation.images = sum(shard.images for shard in manifest.shards)
        return validation
    contents: dict[str, list[ShardContent]] = {split: [] for split in manifest.splits}
    for shard in manifest.shards:
        if shard.name not in validation.problems:
            content = inspect_shard(store, manifest, shard, pixels=depth == "deep")
            if content.problem:
                validation.problems[shard.name] = content.problem
            contents[shard.split].append(content)
        validation.images += shard.images
        on_images(validation.images)
    _compare_with_manifest(manifest, contents, validation)
    return validation


def damaged_shards(
    store: Store, manifest: Manifest, on_images: OnImages = lambda done: None
) -> dict[str, str]:
    """Problems by shard name, after hashing every shard; on_images gets the images checked so far."""
    problems = damaged_sizes(store, manifest)
    done = 0
    for shard in manifest.shards:
        if shard.name not in problems and store.sha256(shard.name) != shard.sha256:
            problems[shard.name] = "its SHA-256 is not the manifest's"
        done += shard.images
        on_images(done)
    return problems


def damaged_sizes(store: Store, manifest: Manifest) -> dict[str, str]:
    """Problems of shards that are missing or have the wrong size, by name."""
    sizes = store.sizes()
    problems: dict[str, str] = {}
    for shard in manifest.shards:
        if shard.name not in sizes:
            problems[shard.name] = "missing"
        elif sizes[shard.name] != shard.bytes:
            problems[shard.name] = f"has {sizes[shard.name]} bytes instead of {shard.bytes}"
    return problems


def _compare_with_manifest(
    manifest: Manifest, contents: dict[str, list[ShardContent]], validation: Validation
) -> None:
    """Compare label histograms with the manifest; count duplicate images."""
    if validation.problems:
        return  # totals over damaged shards would differ in any case
    for split, summary in manifest.splits.items():
        if summary.class_histogram is not None:
            labels = np.concatenate([content.labels for content in contents[split]])
            histogram = np.bincount(labels, minlength=len(summary.class_histogram))
            if tuple(histogram.tolist()) != summary.class_histogram:
                validation.problems["manifest.json"] = (
                    f"the label histogram of {split} differs from that of the shards"
                )
    digests = [content.digests for split in contents.values() for content in split]
    if validation.depth == "deep" and digests:
        joined = np.concatenate(digests)
        duplicates = len(joined) - len(np.unique(joined))
        if duplicates:
            validation.notes.append(f"{duplicates} images are pixel-identical to another one")


def _compare_with_source(
    store: Store, manifest: Manifest, config: DataSection, validation: Validation
) -> None:
    try:
        plan = make_plan(config)
        if manifest.recipe == plan.source.facts.earlier_recipe:
            raise UserError("an earlier version wrote the shards, which orders images in another way")
        try:
            differing = differing_shards(plan, manifest)
        finally:
            plan.source.release()
    except UserError as error:
        validation.notes.append(f"not compared with the source: {error}")
        return
    for name in differing:
        validation.problems.setdefault(name, "the source gives other bytes now")


def differing_shards(plan: ShardPlan, manifest: Manifest) -> list[str]:
    """Names of shards that would have another SHA-256 if written now, or that exist on only one side."""
    written = {shard.name: shard.sha256 for shard in manifest.shards}
    differing = sorted(set(written) - {task.name for task in plan.tasks})
    size = plan.packing.block_images
    for part, tasks in groupby(plan.tasks, key=lambda task: task.part):
        stream = plan.source.open(part)
        try:
            for task in tasks:
                shard = ShardFile(_NullFile(), task.number, plan.packing.layout)
                for number, first in enumerate(range(0, task.rows, size)):
                    shard.add(number, stream.read(min(size, task.rows - first)))
                digest = shard.finish()
                if written.get(task.name) != (digest if shard.images else None):
                    differing.append(task.name)
        finally:
            stream.close()
    return differing


class _NullFile:
    """A file that discards all writes."""

    def write(self, content: bytes | memoryview) -> int:
        return len(content)
