"""Assignment of source images to shards, fixed before anything is written."""

import json
import os
from dataclasses import dataclass
from math import ceil, prod

from fm_core.config.data import DataSection
from fm_core.data.class_order import RelabeledSource, read_label_map
from fm_core.data.manifest import (
    MANIFEST_NAME,
    Input,
    Interpretation,
    Packing,
    Recipe,
    load_manifest,
    read_record,
)
from fm_core.data.shard_sidecar import SIDECAR_FOLDER
from fm_core.data.sources import open_source
from fm_core.data.sources.base import Classes, DataSource, SourceFacts, SourcePart
from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.imagenet_ilsvrc import ORDER_BY_NUMBER
from fm_core.errors import UserError
from fm_core.storage.local_paths import expand_home
from fm_core.storage.store import Store

PLAN_NAME = "plan.json"
VALIDATION_KEY = "validation_images"
PLAN_SCHEMA = 1
PROBED_IMAGES = 64
"""Number of images whose values are checked before anything is written."""
REMOVE_PLAN = "remove it and run fm shard again"
ASSUMED_CLASSES = 1000
"""Assumed number of classes before a data set is sharded, that of ImageNet."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: rows [start, start + rows) of a part. A shard never spans two parts."""

    name: str
    """File name, e.g. train-000012.tar."""
    split: str
    """train, or val for validation."""
    number: int
    """Number of the shard in its split, from 0."""
    part: SourcePart
    """Part of the source with its images."""
    start: int
    """First row in the part."""
    rows: int
    """Number of rows, including unreadable images."""


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a data set, to be written from a source."""

    source: DataSource
    """The source; it is opened lazily and cheap to pickle."""
    classes: Classes
    """What the labels mean."""
    packing: Packing
    """How images are packed into shards."""
    inputs: tuple[Input, ...]
    """The source's files."""
    tasks: tuple[ShardTask, ...]
    """The shards, train first, in the order of the parts."""
    interpretation: Interpretation
    """How splits, classes and pixels were decided."""
    source_url: str | None = None
    """Where the images are; None for the digits."""

    @property
    def recipe(self) -> Recipe:
        """The recipe; without the number of validation images if the source has a validation split."""
        recipe = self.source.facts.recipe
        if self.interpretation.own_validation and VALIDATION_KEY in recipe:
            return {**recipe, VALIDATION_KEY: None}
        return recipe

    @property
    def images(self) -> int:
        """Rows of the source, over all splits."""
        return sum(task.rows for task in self.tasks)

    @property
    def bytes(self) -> int:
        """Approximate size of the shards in bytes; PNGs take less."""
        return self.images * (prod(self.source.facts.image_shape) + 12) + len(self.tasks) * 20_480


def make_plan(config: DataSection) -> ShardPlan:
    """List the source and plan the shards; UserError if files are missing or not as published."""
    source = labeled_source(config)
    if source.facts.recipe["source"] == "imagenet-folder" and _recorded_order(config) == ORDER_BY_NUMBER:
        source = labeled_source(config, val_by_number=True)
    try:
        return _planned(source, packing_of(config, source.facts), source_url(config))
    except BaseException:
        source.release()  # otherwise the copies of a source that cannot be planned would never be removed
        raise


def _planned(source: DataSource, packing: Packing, url: str | None) -> ShardPlan:
    tasks: list[ShardTask] = []
    numbers: dict[str, int] = {}
    for part in source.parts():
        for index in range(ceil(part.rows / packing.shard_images)):
            number = numbers.get(part.split, 0)
            numbers[part.split] = number + 1
            start = index * packing.shard_images
            rows = min(packing.shard_images, part.rows - start)
            name = f"{part.split}-{number:06d}.tar"
            tasks.append(ShardTask(name, part.split, number, part, start, rows))
    return ShardPlan(
        source, source.classes(), packing, tuple(source.inputs()), tuple(tasks), source.interpretation(), url
    )


def source_url(config: DataSection) -> str | None:
    """Canonical data.source.url; a local path is absolute, without symbolic links."""
    url = config.source.url
    if url is None or "://" in url:
        return url and url.rstrip("/")
    return printable(os.path.realpath(expand_home(url)))


def _recorded_order(config: DataSection) -> str | None:
    """Order of the images of an existing or partly written data set; None without one.

    Earlier versions did not record it, and did not shuffle validation images in class folders.
    """
    store = Store.at(config.root, config.name)
    for name in (MANIFEST_NAME, PLAN_NAME):
        try:
            record = json.loads(store.read_bytes(name))
        except (FileNotFoundError, ValueError):
            continue
        if name == MANIFEST_NAME:
            return (record.get("interpretation") or {}).get("order", ORDER_BY_NUMBER)
        return record.get("order", ORDER_BY_NUMBER) if _begun(store) else None
    return None


def _begun(store: Store) -> bool:
    return bool(Store.at(store.url, SIDECAR_FOLDER).sizes())


def labeled_source(
    config: DataSection, detected: str | None = None, val_by_number: bool = False
) -> DataSource:
    """`open_source`, with classes renumbered by data.label_map if that is set."""
    source = open_source(config, detected, val_by_number)
    return RelabeledSource(source, read_label_map(config.label_map)) if config.label_map else source


def packing_of(config: DataSection, facts: SourceFacts) -> Packing:
    """The packing of the configuration."""
    block_images = max(1, config.block_bytes // prod(facts.image_shape))
    return Packing(layout=config.layout, block_images=block_images, shard_blocks=config.shard_blocks)


def record_plan(store: Store, plan: ShardPlan, same_files: bool = True) -> None:
    """Write plan.json, or compare the plan with that of an earlier call; UserError if it differs.

    Before the first shard is written, the labels of all parts are checked; UserError for an invalid one. A
    plan without any written shard is replaced. With same_files, the source's files must be those of the
    earlier call; this is not needed if the shards will be compared with a manifest.
    """
    try:
        text = store.read_bytes(PLAN_NAME)
        begun = _begun(store)
    except FileNotFoundError:
        text, begun = b"", False
    if not begun:
        check_plan(plan)
        record = {
            "schema_version": PLAN_SCHEMA,
            "recipe": plan.recipe,
            "packing": plan.packing.model_dump(mode="json"),
            "inputs": [item.model_dump(mode="json") for item in plan.inputs],
            "state": plan.source.state(),
            "order": plan.interpretation.order,
            "source_url": plan.source_url,
        }
        content = (json.dumps(record, indent=1) + "\n").encode()
        if content != text:
            store.write_bytes(PLAN_NAME, content)
        return
    earlier = read_record(text, f"{store.url}/{PLAN_NAME}", PLAN_SCHEMA, REMOVE_PLAN)
    packing = Packing.model_validate(earlier["packing"])
    check_same_recipe(store, earlier["recipe"], packing, plan.recipe, plan.packing)
    inputs = [item.model_dump(mode="json") for item in plan.inputs]
    if same_files and (
        earlier["inputs"] != inputs or earlier.get("state", "") not in ("", plan.source.state())
    ):
        raise UserError(
            f"{store.url}: the source files are not those that the earlier shards were written from, or were "
            "modified since; restore them, choose another data.name, or remove the folder"
        )


def check_plan(plan: ShardPlan) -> None:
    """Check the labels of all parts and the values of the first images.

    Raises UserError for an invalid label, for values whose range is unknown, and if the images contain only 0
    and 1, which are two nearly black levels of 256.
    """
    plan.source.check_labels()
    if not plan.tasks or plan.source.facts.levels != 256:
        return
    part = plan.tasks[0].part
    stream = plan.source.open(part)
    try:
        images = stream.read(min(PROBED_IMAGES, part.rows)).images
    finally:
        stream.close()
    if images.size and images.max() == 1:
        raise UserError(
            f"data.source.url: the first images of {plan.source_url} have only intensities 0 and 1 of 255; "
            "multiply them, or set data.source.value_range if they are arrays or of 16 bits"
        )


def check_same_recipe(
    store: Store, recipe: Recipe, packing: Packing, asked: Recipe, asked_packing: Packing
) -> None:
    """Check that a recipe is that of the existing data set; UserError lists the differences."""
    existing = {**recipe, **packing.model_dump()}
    requested = {**asked, **asked_packing.model_dump()}
    if VALIDATION_KEY in existing and existing[VALIDATION_KEY] is None:
        requested[VALIDATION_KEY] = None  # the source has validation images, so the key has no effect
    differences = [
        f"{key} is {existing.get(key)!r} there, {requested.get(key)!r} here"
        for key in dict.fromkeys((*existing, *requested))
        if existing.get(key) != requested.get(key)
    ]
    if differences:
        raise UserError(
            f"{store.url}: contains another data set ({'; '.join(differences)}); choose another data.name"
        )


def image_shape_and_classes(data: DataSection) -> tuple[tuple[int, int, int], int]:
    """Image shape (channels, height, width) and number of classes of a data set, 0 without labels.

    Taken from the manifest; without one, the shape is the source's and 1,000 classes are assumed. Raises
    UserError if neither is available.
    """
    try:
        manifest = load_manifest(data.root, data.name)
    except UserError:
        return open_source(data).facts.image_shape, ASSUMED_CLASSES
    return manifest.image_shape, manifest.class_count or 0
