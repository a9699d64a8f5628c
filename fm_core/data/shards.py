"""Writing a data set: shards one by one, each with its commit mark, the manifest last.

At any moment the folder holds whole, committed shards and perhaps unfinished ones that no record
names. Running the same call again continues; on a complete data set it checks every hash.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy as np

from fm_core.config.data import DataSection
from fm_core.data.commits import (
    Commit,
    Moments,
    RejectedImage,
    commit_path,
    moments_of,
    read_commits,
)
from fm_core.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Quarantine,
    Shard,
    Split,
    parse_manifest,
)
from fm_core.data.plan import ShardPlan, ShardTask, compare_recipes, make_plan, packing_of, record_plan
from fm_core.data.sources import open_source
from fm_core.data.sources.base import Rows, SourceFacts
from fm_core.data.store import Store
from fm_core.data.tarfiles import ShardFile
from fm_core.data.verify import damaged_shards
from fm_core.errors import UserError

OnImages = Callable[[int], None]


def check_source(config: DataSection) -> None:
    """Check, in seconds, that a data set is there or can be made; UserError says what is missing."""
    if read_complete(config) is None:
        make_plan(config)


def write_dataset(config: DataSection, on_images: OnImages = lambda done: None) -> Manifest:
    """Make the data set complete, or check every hash of one that is; its manifest.

    on_images is called with the number of images (source rows) in committed or checked shards so
    far; make_plan(config).images is their total. A shard whose hash is wrong is written again.
    Raises UserError if the source is missing or wrong, if another recipe is at this name, or if the
    disk has no room.
    """
    store = Store.at(config.root, config.name)
    complete = read_complete(config)
    damaged: dict[str, str] = {}
    if complete is not None:
        damaged = damaged_shards(store, complete, on_images)
        if not damaged:
            return complete
        _forget(store, damaged)
    try:
        plan = make_plan(config)
    except UserError as error:
        if complete is None:
            raise
        raise UserError(
            f"{store.url}: {', '.join(damaged)} damaged, and not to be made again: {error}"
        ) from None
    record_plan(store, plan)
    write_missing(store, plan, on_images)
    return finish(store, config.name, plan, complete)


def read_complete(config: DataSection) -> Manifest | None:
    """The manifest, if there is one; UserError if it is of another recipe than the configuration's."""
    store = Store.at(config.root, config.name)
    try:
        text = store.read_bytes(MANIFEST_NAME)
    except FileNotFoundError:
        return None
    manifest = parse_manifest(text, f"{store.url}/{MANIFEST_NAME}")
    facts = open_source(config).facts
    compare_recipes(store, manifest.recipe, manifest.packing, facts.recipe, packing_of(config, facts))
    return manifest


def write_missing(store: Store, plan: ShardPlan, on_images: OnImages) -> None:
    """Write the shards that have no commit mark."""
    store.remove_stale_stages()
    commits = read_commits(store, [task.name for task in plan.tasks])
    missing = [task for task in plan.tasks if task.name not in commits]
    _require_space(store, plan, missing)
    done = plan.images - sum(task.rows for task in missing)
    on_images(done)
    for _, group in groupby(missing, key=lambda task: task.part):
        for rows in write_part(store, plan, list(group)):
            done += rows
            on_images(done)


def write_part(store: Store, plan: ShardPlan, tasks: Sequence[ShardTask]) -> Iterable[int]:
    """Write shards of one part, in order; yields the rows of each when it is committed.

    If the part proves damaged, its shards of this call are uncommitted: an archive's CRC comes last.
    """
    stream = plan.source.open(tasks[0].part)
    row = 0
    written: list[str] = []
    try:
        for task in tasks:
            stream.skip(task.start - row)
            blocks = (
                stream.read(min(plan.packing.block_images, task.rows - first))
                for first in range(0, task.rows, plan.packing.block_images)
            )
            write_shard(store, plan.source.facts, task, blocks)
            written.append(task.name)
            row = task.start + task.rows
            yield task.rows
    except UserError:
        _forget(store, written)
        raise
    finally:
        stream.close()


def write_shard(store: Store, facts: SourceFacts, task: ShardTask, blocks: Iterable[Rows]) -> Commit:
    """Write one shard and its commit mark."""
    moments = Moments()
    histogram = np.zeros(facts.class_count or 0, np.int64)
    rejected: list[RejectedImage] = []
    with store.staged(task.name) as (_, file):
        shard = ShardFile(file, task.number)
        for number, rows in enumerate(blocks):
            shard.add(number, rows)
            moments = moments.plus(moments_of(rows.images, facts.levels))
            if rows.labels is not None:
                histogram += np.bincount(rows.labels, minlength=len(histogram))
            rejected += [RejectedImage(**vars(item)) for item in rows.rejected]
        sha256 = shard.finish()
    commit = Commit(
        name=task.name,
        split=task.split,
        bytes=shard.bytes,
        sha256=sha256,
        images=sum(block.images for block in shard.blocks),
        blocks=tuple(shard.blocks),
        class_histogram=tuple(histogram.tolist()) if facts.class_count else None,
        moments=moments,
        rejected=tuple(rejected),
    )
    store.write_bytes(commit_path(task.name), (commit.model_dump_json() + "\n").encode())
    return commit


def finish(store: Store, name: str, plan: ShardPlan, before: Manifest | None = None) -> Manifest:
    """Gather the commit marks and write the manifest.

    `before` is the manifest of shards that were written again: the new ones must equal the old.
    """
    commits = read_commits(store, [task.name for task in plan.tasks])
    absent = [task.name for task in plan.tasks if task.name not in commits]
    if absent:
        raise UserError(
            f"{store.url}: {len(absent)} shards are not written, {absent[0]} first; run fm shard again"
        )
    manifest = gather(name, plan, [commits[task.name] for task in plan.tasks])
    if before is not None and manifest.version != before.version:
        raise UserError(
            f"{store.url}: the source has changed: shards written again differ from the manifest's; "
            "choose another data.name, or remove the folder"
        )
    rejected = [item.model_dump() for commit in commits.values() for item in commit.rejected]
    if rejected:
        lines = "".join(json.dumps(item) + "\n" for item in rejected)
        store.write_bytes("quarantine.jsonl", lines.encode())
    store.write_bytes(MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def gather(name: str, plan: ShardPlan, commits: Sequence[Commit]) -> Manifest:
    """The manifest of committed shards, in the plan's order."""
    facts = plan.source.facts
    shards: list[Shard] = []
    first: dict[str, int] = {}
    for commit in commits:
        if commit.images:
            shards.append(
                Shard(
                    first_id=first.get(commit.split, 0),
                    **commit.model_dump(include={"name", "split", "bytes", "sha256", "images", "blocks"}),
                )
            )
        first[commit.split] = first.get(commit.split, 0) + commit.images
    reasons = [item.reason for commit in commits for item in commit.rejected]
    return Manifest(
        name=name,
        levels=facts.levels,
        image_shape=facts.image_shape,
        class_count=facts.class_count,
        label_order=facts.label_order,
        packing=plan.packing,
        recipe=facts.recipe,
        inputs=plan.inputs,
        splits={
            split: _summary([commit for commit in commits if commit.split == split])
            for split in dict.fromkeys(commit.split for commit in commits)
        },
        shards=tuple(shards),
        quarantine=Quarantine(
            images=len(reasons), reasons={r: reasons.count(r) for r in sorted(set(reasons))}
        ),
    )


def _summary(commits: Sequence[Commit]) -> Split:
    moments = Moments()
    for commit in commits:
        moments = moments.plus(commit.moments)
    histograms = [commit.class_histogram for commit in commits if commit.class_histogram is not None]
    return Split(
        images=sum(commit.images for commit in commits),
        class_histogram=tuple(map(sum, zip(*histograms, strict=True))) if histograms else None,
        channel_mean=moments.mean(),
        channel_std=moments.std(),
    )


def _forget(store: Store, names: Iterable[str]) -> None:
    for name in names:
        store.remove(commit_path(name))


def _require_space(store: Store, plan: ShardPlan, missing: Sequence[ShardTask]) -> None:
    free = store.free_bytes()
    needed = plan.bytes * sum(task.rows for task in missing) // max(1, plan.images)
    if free is not None and free < needed:
        raise UserError(
            f"data.root: {store.url} has {free / 1e9:.1f} GB free, the shards need {needed / 1e9:.1f} GB; "
            "free some space or choose another data.root"
        )
