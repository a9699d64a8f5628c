"""Making a data set complete: what is missing is written, the manifest last; what is there is checked."""

import json
import os
from collections.abc import Callable, Sequence

from fm_core.config.data import DataSection
from fm_core.data.manifest import MANIFEST_NAME, Manifest, Quarantine, Shard, Split, parse_manifest
from fm_core.data.shard_plan import (
    ShardPlan,
    ShardTask,
    compare_recipes,
    labelled_source,
    make_plan,
    packing_of,
    record_plan,
)
from fm_core.data.shard_sidecar import PixelMoments, ShardSidecar, read_sidecars
from fm_core.data.shard_writer import missing_tasks, uncommit, write_tasks
from fm_core.data.verify import damaged_shards
from fm_core.data.wids_index import write_indexes
from fm_core.errors import DamagedRecordError, UserError
from fm_core.storage.store import Store

QUARANTINE_NAME = "quarantine.jsonl"
OnImages = Callable[[int], None]


def check_source(config: DataSection) -> None:
    """Check, in seconds, that a data set is there or can be made; UserError says what is missing."""
    if read_complete(config) is None:
        make_plan(config)


def write_dataset(config: DataSection, on_images: OnImages = lambda done: None) -> Manifest:
    """Make the data set complete, or check every hash of one that is; its manifest.

    on_images is called with the number of images (source rows) in committed or checked shards so
    far; make_plan(config).images is their total. A shard whose hash is wrong is written again.
    Raises UserError if the source is missing or wrong, if another recipe is at this name, if too many
    images are unreadable, or if the disk has no room.
    """
    store = Store.at(config.root, config.name)
    complete = read_complete(config)
    damaged: dict[str, str] = {}
    if complete is not None:
        damaged = damaged_shards(store, complete, on_images)
        if not damaged:
            return complete
        uncommit(store, damaged)
    try:
        plan = make_plan(config)
    except UserError as error:
        if complete is None:
            raise
        names = ", ".join(damaged)
        raise UserError(f"{store.url}: {names} damaged, and not to be made again: {error}") from None
    record_plan(store, plan, same_files=complete is None)  # else `finish` compares the shards
    write_missing(store, plan, config, on_images)
    return finish(store, plan, config, complete)


def read_complete(config: DataSection) -> Manifest | None:
    """The manifest, if there is one; UserError if it is of another recipe than the configuration's."""
    store = Store.at(config.root, config.name)
    try:
        text = store.read_bytes(MANIFEST_NAME)
    except FileNotFoundError:
        return None
    manifest = parse_manifest(text, f"{store.url}/{MANIFEST_NAME}")
    facts = labelled_source(config, found=str(manifest.recipe.get("source"))).facts
    compare_recipes(store, manifest.recipe, manifest.packing, facts.recipe, packing_of(config, facts))
    return manifest


def write_missing(store: Store, plan: ShardPlan, config: DataSection, on_images: OnImages) -> None:
    """Write the shards that have no commit mark; UserError if too many images are rejected."""
    store.remove_stale_stages()
    missing, rejected = missing_tasks(store, plan)
    _require_space(store, plan, missing)
    done = plan.images - sum(task.rows for task in missing)
    on_images(done)

    def told(rows: int, left_out: int) -> None:
        nonlocal done, rejected
        done, rejected = done + rows, rejected + left_out
        if rejected > allowed_rejections(plan, config):
            _refuse_quarantined(store, plan, config)
        on_images(done)

    write_tasks(store, plan, missing, config.workers or os.cpu_count() or 1, told)


def allowed_rejections(plan: ShardPlan, config: DataSection) -> int:
    """How many images may be left out."""
    share = config.max_quarantined
    return int(plan.images * (plan.source.facts.max_quarantined if share is None else share))


def finish(store: Store, plan: ShardPlan, config: DataSection, before: Manifest | None = None) -> Manifest:
    """Gather the commit marks and write the manifest.

    `before` is the manifest of shards that were written again: the new ones must equal the old.
    """
    commits = read_sidecars(store, [task.name for task in plan.tasks])
    absent = [task.name for task in plan.tasks if task.name not in commits]
    if absent:
        raise UserError(
            f"{store.url}: {len(absent)} shards are not written, {absent[0]} first; run fm shard again"
        )
    ordered = [commits[task.name] for task in plan.tasks]
    if sum(len(commit.rejected) for commit in ordered) > allowed_rejections(plan, config):
        _refuse_quarantined(store, plan, config)
    manifest = gather(config.name, plan, ordered)
    if before is not None and manifest.version != before.version:
        raise UserError(
            f"{store.url}: the source has changed: shards written again differ from the manifest's; "
            "choose another data.name, or remove the folder"
        )
    _write_quarantine(store, ordered)
    write_indexes(store, manifest)
    store.write_bytes(MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def gather(name: str, plan: ShardPlan, commits: Sequence[ShardSidecar]) -> Manifest:
    """The manifest of committed shards, in the plan's order."""
    shards: list[Shard] = []
    first: dict[str, int] = {}
    copied = {"name", "split", "bytes", "sha256", "images", "blocks", "index_offset"}
    for commit in commits:
        if commit.images:
            shards.append(Shard(first_id=first.get(commit.split, 0), **commit.model_dump(include=copied)))
        first[commit.split] = first.get(commit.split, 0) + commit.images
    reasons = [item.reason for commit in commits for item in commit.rejected]
    return Manifest(
        name=name,
        levels=plan.source.facts.levels,
        image_shape=plan.source.facts.image_shape,
        class_count=plan.classes.count,
        label_order=plan.classes.order,
        class_names=plan.classes.names,
        packing=plan.packing,
        recipe=plan.source.facts.recipe,
        inputs=plan.inputs,
        splits={
            split: _summary([commit for commit in commits if commit.split == split])
            for split in dict.fromkeys(commit.split for commit in commits)
        },
        shards=tuple(shards),
        quarantine=Quarantine(
            images=len(reasons), reasons={reason: reasons.count(reason) for reason in sorted(set(reasons))}
        ),
    )


def _summary(commits: Sequence[ShardSidecar]) -> Split:
    moments = PixelMoments()
    for commit in commits:
        moments = moments.plus(commit.moments)
    histograms = [commit.class_histogram for commit in commits if commit.class_histogram is not None]
    return Split(
        images=sum(commit.images for commit in commits),
        class_histogram=tuple(map(sum, zip(*histograms, strict=True))) if histograms else None,
        channel_mean=moments.mean(),
        channel_std=moments.std(),
    )


def _write_quarantine(store: Store, commits: Sequence[ShardSidecar]) -> list[str]:
    """One line for each rejected image, in the order of the source."""
    rejected = [item for commit in commits for item in commit.rejected]
    lines = [json.dumps(item.model_dump()) for item in rejected]
    if lines:
        store.write_bytes(QUARANTINE_NAME, "".join(f"{line}\n" for line in lines).encode())
    return [f"{item.key}: {item.reason}" for item in rejected]


def _refuse_quarantined(store: Store, plan: ShardPlan, config: DataSection) -> None:
    commits = read_sidecars(store, [task.name for task in plan.tasks])
    lines = _write_quarantine(store, [commits[task.name] for task in plan.tasks if task.name in commits])
    raise UserError(
        f"data.max_quarantined: {len(lines)} of {plan.images} images cannot be used, "
        f"{allowed_rejections(plan, config)} may be left out; first {lines[0]}; "
        f"all are in {store.url}/{QUARANTINE_NAME}"
    )


def _require_space(store: Store, plan: ShardPlan, missing: Sequence[ShardTask]) -> None:
    free = store.free_bytes()
    needed = plan.bytes * sum(task.rows for task in missing) // max(1, plan.images)
    if free is not None and free < needed:
        raise UserError(
            f"data.root: {store.url} has {free / 1e9:.1f} GB free, the shards need {needed / 1e9:.1f} GB; "
            "free some space or choose another data.root"
        )


def repair_dataset(
    config: DataSection,
    on_images: OnImages = lambda done: None,
    on_hashed: OnImages = lambda done: None,
) -> Manifest:
    """Write damaged or missing shards again, and the manifest if that is damaged; the manifest.

    on_hashed gets the images in shards that were looked at so far, then on_images those as in write_dataset.
    Shards are checked by their commit marks' hashes where there is no manifest to go by. Raises
    UserError if the source is needed and not to be had, or would give other bytes; and for a manifest
    that cannot be read now or is of another schema, which is no damage and stays.
    """
    store = Store.at(config.root, config.name)
    try:
        parse_manifest(store.read_bytes(MANIFEST_NAME), MANIFEST_NAME)
    except FileNotFoundError:
        pass
    except DamagedRecordError:
        store.remove(MANIFEST_NAME)
    plan_names = [name for name in store.sizes() if name.endswith(".tar")]
    marks = read_sidecars(store, plan_names)
    hashed = 0
    for name, mark in marks.items():
        if store.sha256(name) != mark.sha256:
            uncommit(store, [name])
        hashed += mark.images + len(mark.rejected)
        on_hashed(hashed)
    return write_dataset(config, on_images)
