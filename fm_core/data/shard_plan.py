"""Which images of a source go into which shard, decided before anything is written."""

import json
from dataclasses import dataclass
from math import ceil, prod

from fm_core.config.data import DataSection
from fm_core.data.class_order import RelabelledSource, read_label_map
from fm_core.data.manifest import Input, Packing, Recipe, load_manifest, read_record
from fm_core.data.sources import open_source
from fm_core.data.sources.base import Classes, DataSource, SourceFacts, SourcePart
from fm_core.errors import UserError
from fm_core.storage.store import Store

PLAN_NAME = "plan.json"
PLAN_SCHEMA = 1


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: rows [start, start + rows) of a part. Shards never straddle parts."""

    name: str
    """File name, e.g. train-000012.tar."""
    split: str
    """train or val."""
    number: int
    """Its number in the split."""
    part: SourcePart
    """Where its images come from."""
    start: int
    """First row in the part."""
    rows: int
    """Rows, the unreadable ones included."""


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a data set."""

    source: DataSource
    """Opened lazily; cheap to send to another process."""
    classes: Classes
    """What the labels mean."""
    packing: Packing
    """How images are laid into shards."""
    inputs: tuple[Input, ...]
    """The source's files."""
    tasks: tuple[ShardTask, ...]
    """The shards, train first, parts in their order."""

    @property
    def images(self) -> int:
        """Rows of the source, over all splits."""
        return sum(task.rows for task in self.tasks)

    @property
    def bytes(self) -> int:
        """About how much space the shards take; PNGs take less."""
        return self.images * (prod(self.source.facts.image_shape) + 12) + len(self.tasks) * 20_480


def make_plan(config: DataSection) -> ShardPlan:
    """List the source and lay out the shards; UserError if files are missing or not what they should be."""
    source = labelled_source(config)
    packing = packing_of(config, source.facts)
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
    return ShardPlan(source, source.classes(), packing, tuple(source.inputs()), tuple(tasks))


def labelled_source(config: DataSection, found: str | None = None) -> DataSource:
    """The source, its classes renumbered if data.label_map says so; `found` is for format auto."""
    source = open_source(config, found)
    return RelabelledSource(source, read_label_map(config.label_map)) if config.label_map else source


def packing_of(config: DataSection, facts: SourceFacts) -> Packing:
    """The packing that the configuration asks for."""
    block_images = max(1, config.block_bytes // prod(facts.image_shape))
    return Packing(layout=config.layout, block_images=block_images, shard_blocks=config.shard_blocks)


def record_plan(store: Store, plan: ShardPlan, same_files: bool = True) -> None:
    """Write down what is being made, or compare with what an earlier call wrote; UserError if it differs.

    Before the first file is written, the labels of all parts are looked at; UserError for a wrong one. With
    same_files, the source's files must be those of the earlier call: where the shards have a manifest to
    be compared with, they need not.
    """
    try:
        text = store.read_bytes(PLAN_NAME)
    except FileNotFoundError:
        plan.source.check_labels()
        record = {
            "schema_version": PLAN_SCHEMA,
            "recipe": plan.source.facts.recipe,
            "packing": plan.packing.model_dump(mode="json"),
            "inputs": [item.model_dump(mode="json") for item in plan.inputs],
            "state": plan.source.state(),
        }
        store.write_bytes(PLAN_NAME, (json.dumps(record, indent=1) + "\n").encode())
        return
    before = read_record(text, f"{store.url}/{PLAN_NAME}", PLAN_SCHEMA)
    refuse_other_recipe(store, before["recipe"], Packing.model_validate(before["packing"]), plan)
    inputs = [item.model_dump(mode="json") for item in plan.inputs]
    if same_files and (
        before["inputs"] != inputs or before.get("state", "") not in ("", plan.source.state())
    ):
        raise UserError(
            f"{store.url}: begun with other source files than those of now, or they were touched since; "
            "give the old ones back, or choose another data.name, or remove the folder"
        )


def refuse_other_recipe(store: Store, recipe: Recipe, packing: Packing, wanted: ShardPlan) -> None:
    """UserError with the differences if what is at this name was made otherwise than is wanted now."""
    compare_recipes(store, recipe, packing, wanted.source.facts.recipe, wanted.packing)


def compare_recipes(
    store: Store, recipe: Recipe, packing: Packing, asked: Recipe, asked_packing: Packing
) -> None:
    """UserError with the differences between what is there and what is asked for."""
    there = {**recipe, **packing.model_dump()}
    here = {**asked, **asked_packing.model_dump()}
    differences = [
        f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
        for key in dict.fromkeys((*there, *here))
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise UserError(
            f"{store.url}: holds another data set ({'; '.join(differences)}); choose another data.name"
        )


def image_shape_and_classes(data: DataSection) -> tuple[tuple[int, int, int], int]:
    """Image shape (channels, height, width) and number of classes of a data set.

    They are those of the shards; before there are any, the shape is the source's and the classes are 1,000.

    Raises:
        UserError: neither shards nor source are available.
    """
    try:
        manifest = load_manifest(data.root, data.name)
    except UserError:
        return open_source(data).facts.image_shape, 1000
    return manifest.image_shape, manifest.class_count or 0
