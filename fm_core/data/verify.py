"""Checking a written data set against its manifest, and its manifest against its source.

quick: every shard and its commit mark are there and have the right size. default: every SHA-256, the
members' names and places, the labels' histogram. deep: also every image's CRC, the grey values, equal
images, and whether the source would give the same bytes today.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fm_core.config.data import DataSection
from fm_core.data.inspect import ShardContent, inspect_shard
from fm_core.data.manifest import Manifest, load_manifest
from fm_core.data.shard_plan import make_plan
from fm_core.data.shard_sidecar import read_sidecars
from fm_core.data.source_diff import differing_shards
from fm_core.errors import UserError
from fm_core.storage.store import Store

Depth = Literal["quick", "default", "deep"]
OnImages = Callable[[int], None]
VALIDATION_SCHEMA = 1


@dataclass
class Validation:
    """What was found."""

    depth: Depth
    """How closely it was looked."""
    problems: dict[str, str] = field(default_factory=dict)
    """What is wrong, by file name."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and no fault of the files."""
    images: int = 0
    """Images looked at."""

    def to_json(self) -> str:
        """For programs."""
        return json.dumps({"schema_version": VALIDATION_SCHEMA, **vars(self)}, indent=1) + "\n"


def validate_dataset(
    config: DataSection, depth: Depth = "default", on_images: OnImages = lambda done: None
) -> Validation:
    """Look at the data set of the configuration; UserError if there is no manifest to go by.

    Depth deep compares with the source where that is still to be had.
    """
    manifest = load_manifest(config.root, config.name)
    store = Store.at(config.root, config.name)
    found = validate_manifest(store, manifest, depth, on_images)
    if depth == "deep":
        _compare_with_source(store, manifest, config, found)
    return found


def validate_manifest(
    store: Store, manifest: Manifest, depth: Depth, on_images: OnImages = lambda done: None
) -> Validation:
    """Look at the files that a manifest names."""
    found = Validation(depth, damaged_sizes(store, manifest))
    if depth == "quick":
        marks = read_sidecars(store, [shard.name for shard in manifest.shards])
        for shard in manifest.shards:
            if shard.name not in marks and shard.name not in found.problems:
                found.problems[shard.name] = "its commit mark is missing"
        found.images = sum(shard.images for shard in manifest.shards)
        return found
    contents: dict[str, list[ShardContent]] = {split: [] for split in manifest.splits}
    for shard in manifest.shards:
        if shard.name not in found.problems:
            content = inspect_shard(store, manifest, shard, pixels=depth == "deep")
            if content.problem:
                found.problems[shard.name] = content.problem
            contents[shard.split].append(content)
        found.images += shard.images
        on_images(found.images)
    _compare_with_manifest(manifest, contents, found)
    return found


def damaged_shards(
    store: Store, manifest: Manifest, on_images: OnImages = lambda done: None
) -> dict[str, str]:
    """Re-hash every shard; what is wrong, by shard name. on_images gets the images checked so far."""
    problems = damaged_sizes(store, manifest)
    done = 0
    for shard in manifest.shards:
        if shard.name not in problems and store.sha256(shard.name) != shard.sha256:
            problems[shard.name] = "its SHA-256 is not the manifest's"
        done += shard.images
        on_images(done)
    return problems


def damaged_sizes(store: Store, manifest: Manifest) -> dict[str, str]:
    """Shards that are missing or of another size, by name."""
    sizes = store.sizes()
    problems: dict[str, str] = {}
    for shard in manifest.shards:
        if shard.name not in sizes:
            problems[shard.name] = "missing"
        elif sizes[shard.name] != shard.bytes:
            problems[shard.name] = f"holds {sizes[shard.name]} bytes, not {shard.bytes}"
    return problems


def _compare_with_manifest(
    manifest: Manifest, contents: dict[str, list[ShardContent]], found: Validation
) -> None:
    """Histograms and equal images over whole splits."""
    if found.problems:
        return  # sums over damaged shards would say nothing more
    for split, summary in manifest.splits.items():
        if summary.class_histogram is not None:
            labels = np.concatenate([content.labels for content in contents[split]])
            histogram = np.bincount(labels, minlength=len(summary.class_histogram))
            if tuple(histogram.tolist()) != summary.class_histogram:
                found.problems["manifest.json"] = f"the labels of {split} do not have its histogram"
    digests = [content.digests for split in contents.values() for content in split]
    if found.depth == "deep" and digests:
        joined = np.concatenate(digests)
        equal = len(joined) - len(np.unique(joined))
        if equal:
            found.notes.append(f"{equal} images are equal to another one, to the pixel")


def _compare_with_source(store: Store, manifest: Manifest, config: DataSection, found: Validation) -> None:
    try:
        plan = make_plan(config)
        differing = differing_shards(plan, manifest)
    except UserError as error:
        found.notes.append(f"not compared with the source: {error}")
        return
    for name in differing:
        found.problems.setdefault(name, "the source gives other bytes today")
