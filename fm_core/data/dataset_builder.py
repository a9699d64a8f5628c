"""Builder of sharded data sets: writes missing shards, then the manifest; verifies existing shards."""

import json
from collections.abc import Callable, Mapping, Sequence

from fm_core.config.data import DataSection
from fm_core.data.manifest import MANIFEST_NAME, Manifest, Quarantine, Shard, Split, parse_manifest
from fm_core.data.shard_plan import (
    ShardPlan,
    ShardTask,
    check_same_recipe,
    labeled_source,
    make_plan,
    packing_of,
    record_plan,
)
from fm_core.data.shard_sidecar import PixelMoments, ShardSidecar, read_sidecars
from fm_core.data.shard_writer import missing_tasks, remove_sidecars, write_tasks
from fm_core.data.verify import damaged_shards
from fm_core.data.wids_index import write_indexes
from fm_core.errors import DamagedRecordError, UserError
from fm_core.run.progress import byte_size
from fm_core.run.resource_limits import available_cores
from fm_core.storage.store import Store

QUARANTINE_NAME = "quarantine.jsonl"
OnImages = Callable[[int], None]


def check_source(config: DataSection) -> int | None:
    """Check, in seconds, that a data set exists or can be built; returns its number of classes.

    That is None without labels. Raises UserError that names what is missing.
    """
    complete = read_complete(config)
    if complete is not None:
        return complete.class_count
    plan = make_plan(config)
    plan.source.release()
    return plan.classes.count


def write_dataset(config: DataSection, on_images: OnImages = lambda done: None) -> Manifest:
    """Complete the data set, or verify every hash of a complete one; returns its manifest.

    on_images is called with the number of images (source rows) in shards written or verified so far;
    make_plan(config).images is the total. A shard whose hash is wrong is rewritten. Raises UserError if the
    source is missing or wrong, if a data set of another recipe has this name, if too many images are
    unreadable, or if the disk is too small.
    """
    store = Store.at(config.root, config.name)
    complete = read_complete(config)
    damaged: dict[str, str] = {}
    if complete is not None:
        damaged = damaged_shards(store, complete, on_images)
        if not damaged:
            return complete
        _require_same_version(store, config, complete, damaged)
        remove_sidecars(store, damaged)
    try:
        plan = make_plan(config)
    except UserError as error:
        if complete is None:
            raise
        names = ", ".join(damaged)
        raise UserError(f"{store.url}: {names} damaged, and cannot be rewritten: {error}") from None
    try:
        record_plan(store, plan, same_files=complete is None)  # otherwise write_manifest compares the shards
        write_missing(store, plan, config, on_images)
        return write_manifest(store, plan, config, complete)
    finally:
        plan.source.release()


def read_complete(config: DataSection) -> Manifest | None:
    """The manifest, or None without one; UserError if its recipe is not the configuration's.

    The equivalent recipe of an earlier version is accepted.
    """
    store = Store.at(config.root, config.name)
    try:
        text = store.read_bytes(MANIFEST_NAME)
    except FileNotFoundError:
        return None
    manifest = parse_manifest(text, f"{store.url}/{MANIFEST_NAME}")
    facts = labeled_source(config, detected=str(manifest.recipe.get("source"))).facts
    asked = facts.earlier_recipe if manifest.recipe == facts.earlier_recipe else facts.recipe
    check_same_recipe(
        store, manifest.recipe, manifest.packing, asked or facts.recipe, packing_of(config, facts)
    )
    return manifest


def _require_same_version(
    store: Store, config: DataSection, manifest: Manifest, damaged: Mapping[str, str]
) -> None:
    """Raise UserError for damaged shards whose order of images this version cannot reproduce."""
    earlier = labeled_source(config, detected=str(manifest.recipe.get("source"))).facts.earlier_recipe
    if manifest.recipe == earlier:
        raise UserError(
            f"{store.url}: {', '.join(damaged)} damaged, and written by an earlier version, which orders "
            "images in another way: restore them from a copy, or shard the source under another data.name"
        )


def write_missing(store: Store, plan: ShardPlan, config: DataSection, on_images: OnImages) -> None:
    """Write the shards that have no sidecar; UserError if too many images are rejected."""
    store.remove_stale_stages()
    missing, rejected = missing_tasks(store, plan)
    _require_space(store, plan, missing)
    done = plan.images - sum(task.rows for task in missing)
    on_images(done)

    def on_shard(rows: int, rejected_rows: int) -> None:
        nonlocal done, rejected
        done, rejected = done + rows, rejected + rejected_rows
        if rejected > allowed_rejections(plan, config):
            _refuse_quarantined(store, plan, config)
        on_images(done)

    write_tasks(store, plan, missing, config.workers or available_cores(), on_shard)


def allowed_rejections(plan: ShardPlan, config: DataSection) -> int:
    """Largest number of images that may be omitted."""
    share = config.max_quarantined
    return int(plan.images * (plan.source.facts.max_quarantined if share is None else share))


def write_manifest(
    store: Store, plan: ShardPlan, config: DataSection, before: Manifest | None = None
) -> Manifest:
    """Write the manifest from the shards' sidecars.

    `before` is the manifest of a data set after a repair: rewritten shards must equal those in it. Raises
    UserError if shards are missing or differ, or if too many images are rejected.
    """
    sidecars = read_sidecars(store, [task.name for task in plan.tasks])
    missing = [task.name for task in plan.tasks if task.name not in sidecars]
    if missing:
        raise UserError(
            f"{store.url}: {len(missing)} shards are not written, first {missing[0]}; run fm shard again"
        )
    ordered = [sidecars[task.name] for task in plan.tasks]
    if sum(len(sidecar.rejected) for sidecar in ordered) > allowed_rejections(plan, config):
        _refuse_quarantined(store, plan, config)
    manifest = build_manifest(config.name, plan, ordered)
    empty = [split for split, summary in manifest.splits.items() if not summary.images]
    if empty:
        first = _write_quarantine(store, ordered)[0]
        raise UserError(
            f"{store.url}: none of the {empty[0]} images can be used; first {first}; {QUARANTINE_NAME} lists "
            "all"
        )
    if before is not None and manifest.version != before.version:
        raise UserError(
            f"{store.url}: the source has changed (or an earlier version read it in another order): "
            "rewritten shards differ from the manifest; "
            "choose another data.name, or remove the folder"
        )
    if (
        before is not None
    ):  # keys that are absent from an earlier version's record imply how that version read the source
        recorded = {"interpretation": before.interpretation, "source_url": before.source_url}
        manifest = manifest.model_copy(update=recorded)
    _write_quarantine(store, ordered)
    write_indexes(store, manifest)
    store.write_bytes(MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def build_manifest(name: str, plan: ShardPlan, sidecars: Sequence[ShardSidecar]) -> Manifest:
    """Manifest of written shards, in the plan's order."""
    shards: list[Shard] = []
    first: dict[str, int] = {}
    copied = {"name", "split", "bytes", "sha256", "images", "blocks", "index_offset"}
    for sidecar in sidecars:
        if sidecar.images:
            shards.append(Shard(first_id=first.get(sidecar.split, 0), **sidecar.model_dump(include=copied)))
        first[sidecar.split] = first.get(sidecar.split, 0) + sidecar.images
    reasons = [item.reason for sidecar in sidecars for item in sidecar.rejected]
    return Manifest(
        name=name,
        levels=plan.source.facts.levels,
        image_shape=plan.source.facts.image_shape,
        class_count=plan.classes.count,
        label_order=plan.classes.order,
        class_names=plan.classes.names,
        packing=plan.packing,
        recipe=plan.recipe,
        inputs=plan.inputs,
        splits={
            split: _summary([sidecar for sidecar in sidecars if sidecar.split == split])
            for split in dict.fromkeys(sidecar.split for sidecar in sidecars)
        },
        shards=tuple(shards),
        quarantine=Quarantine(
            images=len(reasons), reasons={reason: reasons.count(reason) for reason in sorted(set(reasons))}
        ),
        interpretation=plan.interpretation,
        source_url=plan.source_url,
    )


def _summary(sidecars: Sequence[ShardSidecar]) -> Split:
    moments = PixelMoments()
    for sidecar in sidecars:
        moments = moments.plus(sidecar.moments)
    histograms = [sidecar.class_histogram for sidecar in sidecars if sidecar.class_histogram is not None]
    return Split(
        images=sum(sidecar.images for sidecar in sidecars),
        class_histogram=tuple(map(sum, zip(*histograms, strict=True))) if histograms else None,
        channel_mean=moments.mean(),
        channel_std=moments.std(),
    )


def _write_quarantine(store: Store, sidecars: Sequence[ShardSidecar]) -> list[str]:
    """Write quarantine.jsonl; return one line of text for each rejected image, in source order."""
    rejected = [item for sidecar in sidecars for item in sidecar.rejected]
    lines = [json.dumps(item.model_dump()) for item in rejected]
    if lines:
        store.write_bytes(QUARANTINE_NAME, "".join(f"{line}\n" for line in lines).encode())
    return [f"{item.key}: {item.reason}" for item in rejected]


def _refuse_quarantined(store: Store, plan: ShardPlan, config: DataSection) -> None:
    sidecars = read_sidecars(store, [task.name for task in plan.tasks])
    lines = _write_quarantine(store, [sidecars[task.name] for task in plan.tasks if task.name in sidecars])
    raise UserError(
        f"data.max_quarantined: {len(lines)} of {plan.images} images cannot be used, "
        f"{allowed_rejections(plan, config)} may be left out; first {lines[0]}; "
        f"{store.url}/{QUARANTINE_NAME} lists all"
    )


def _require_space(store: Store, plan: ShardPlan, missing: Sequence[ShardTask]) -> None:
    free = store.free_bytes()
    needed = plan.bytes * sum(task.rows for task in missing) // max(1, plan.images)
    if free is not None and free < needed:
        raise UserError(
            f"data.root: {store.url} has {byte_size(free)} free, the shards need {byte_size(needed)}; "
            "free some space or choose another data.root"
        )


def repair_dataset(
    config: DataSection,
    on_images: OnImages = lambda done: None,
    on_hashed: OnImages = lambda done: None,
) -> Manifest:
    """Rewrite damaged or missing shards, and a damaged manifest; returns the manifest.

    on_hashed gets the number of images in the shards hashed so far; on_images is as in write_dataset. Without
    a manifest, shards are verified by the hashes in their sidecars. Raises UserError if the source is needed
    and missing, or would produce other bytes; and for a manifest that cannot be read at the moment or has
    another schema, which is not damage and is not replaced.
    """
    store = Store.at(config.root, config.name)
    try:
        parse_manifest(store.read_bytes(MANIFEST_NAME), MANIFEST_NAME)
    except FileNotFoundError:
        pass
    except DamagedRecordError:
        store.remove(MANIFEST_NAME)
    shard_names = [name for name in store.sizes() if name.endswith(".tar")]
    sidecars = read_sidecars(store, shard_names)
    hashed = 0
    for name, sidecar in sidecars.items():
        if store.sha256(name) != sidecar.sha256:
            remove_sidecars(store, [name])
        hashed += sidecar.images + len(sidecar.rejected)
        on_hashed(hashed)
    return write_dataset(config, on_images)
