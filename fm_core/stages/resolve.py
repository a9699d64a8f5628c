"""Values of the keys that a configuration does not name: those of the run, or derived from its data set.

Every stage resolves its configuration first, so that a file which names only data.source.url and
data.source.image_size means the same run at every stage. A run that was trained keeps the values that its
config.yaml records, whatever a later version would derive.
"""

import json
from collections.abc import Sequence
from typing import Any, cast

from fm_core.config import RunConfig
from fm_core.config.data import DataSection
from fm_core.config.derived_defaults import (
    DatasetSize,
    absent_keys,
    dataset_name,
    validation_images_for,
    with_derived,
    with_generator,
    with_values_of,
)
from fm_core.config.tree import did_you_mean
from fm_core.data.dataset_builder import read_complete
from fm_core.data.manifest import MANIFEST_NAME, Manifest, Recipe, load_manifest
from fm_core.data.shard_plan import PLAN_NAME, make_plan, source_url
from fm_core.data.sources import open_source
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory
from fm_core.storage.store import Store


def resolve(config: RunConfig, from_source: bool = False) -> RunConfig:
    """The configuration with the keys that it does not name; nothing is written.

    They are taken from config.yaml of a run that was trained, else derived from the manifest. Before there is
    one, `from_source` derives them from the source, which is listed; without it, network and training keep
    the sections' own defaults.

    Raises UserError, with `from_source`, if neither the data set nor its source is there, or if there is
    another data set.
    """
    return _with_class_numbers(_with_absent_keys(config, from_source))


def _with_class_numbers(config: RunConfig) -> RunConfig:
    """The configuration with the number of each class that sample.classes names, if the data set is there.

    A name that is no class but a number is that number. Raises UserError for other names, and ambiguous ones.
    """
    if not any(isinstance(name, str) for name in config.sample.classes):
        return config
    try:
        names = load_manifest(config.data.root, config.data.name).class_names or ()
    except UserError:
        return config  # the stage itself says what is missing
    numbers = tuple(_class_number(name, names) for name in config.sample.classes)
    return config.model_copy(update={"sample": config.sample.model_copy(update={"classes": numbers})})


def _class_number(name: int | str, names: Sequence[str]) -> int:
    if isinstance(name, int):
        return name
    matches = [number for number, each in enumerate(names) if each == name]
    if len(matches) > 1:
        raise UserError(f"sample.classes: the classes {matches} are all named {name!r}; give a number")
    if not matches and name.isdecimal():
        return int(name)
    if not matches:
        raise UserError(
            f"sample.classes: no class of the data set is named {name!r}{did_you_mean(name, names)}"
        )
    return matches[0]


def _with_absent_keys(config: RunConfig, from_source: bool) -> RunConfig:
    bound = RunDirectory(config).bound_config()
    config = with_generator(config, bound)
    if not absent_keys(config):
        return config
    if bound is not None:
        return with_values_of(config, bound)
    config = _with_name(config)
    try:
        config = _with_validation_images(config, from_source)
        size = (
            _planned_size(config)
            if from_source
            else _size_of(load_manifest(config.data.root, config.data.name))
        )
    except UserError:
        if from_source:
            raise
        return config  # the stage itself says what is missing
    return with_derived(config, size)


def resolve_data(config: RunConfig) -> RunConfig:
    """The configuration with the keys of the data section that it does not name; for sharding.

    Raises UserError if the source is not there.
    """
    bound = RunDirectory(config).bound_config()
    config = with_generator(config, bound)
    if not absent_keys(config).get("data"):
        return config
    if bound is not None:
        return with_values_of(config, bound)
    return _with_validation_images(_with_name(config), from_source=True)


def _planned_size(config: RunConfig) -> DatasetSize:
    if (manifest := read_complete(config.data)) is not None:
        return _size_of(manifest)
    plan = make_plan(config.data)
    plan.source.release()
    images = sum(task.rows for task in plan.tasks if task.split == "train")
    return DatasetSize(plan.source.facts.image_shape[-1], images)


def _size_of(manifest: Manifest) -> DatasetSize:
    return DatasetSize(manifest.image_shape[-1], manifest.splits["train"].images)


def _with_name(config: RunConfig) -> RunConfig:
    if "name" not in absent_keys(config).get("data", []):
        return config
    data = config.data.model_copy(update={"name": dataset_name(config.data)})
    _require_source(data)
    return config.model_copy(update={"data": data})


def _require_source(data: DataSection) -> None:
    """Raise UserError for a data set that was made from another URL whose last part is the same.

    Only a derived name is checked: who writes data.name may move the source. Records of earlier versions do
    not name the URL, and pass.
    """
    store, here = Store.at(data.root, data.name), source_url(data)
    there = _recorded(store, MANIFEST_NAME).get("source_url", here)
    if there not in (None, here):
        raise UserError(
            f"{store.url}: holds the images of {there}, not those of {here}; write data.name: another name, "
            f"or {data.name} if these are the same images"
        )


def _with_validation_images(config: RunConfig, from_source: bool) -> RunConfig:
    """The configuration with data.validation_images; the source is opened only before there is a data set."""
    if "validation_images" not in absent_keys(config).get("data", []):
        return config
    data = config.data
    recipe = _recorded_recipe(data)
    if recipe is not None:
        # None where the source has validation images of its own: the section's default has no effect.
        images = recipe.get("validation_images")
    else:
        images = _planned_validation_images(data) if from_source else None
    if images is None:
        return config
    data = data.model_copy(update={"validation_images": int(images)})
    return config.model_copy(update={"data": data})


def _planned_validation_images(data: DataSection) -> int | None:
    source = open_source(data.model_copy(update={"validation_images": 1}))
    if "validation_images" not in source.facts.recipe:
        return None
    try:
        return validation_images_for(sum(part.rows for part in source.parts()))
    except BaseException:
        source.release()  # otherwise the copies are read again when the shards are planned
        raise


def _recorded_recipe(data: DataSection) -> Recipe | None:
    """The recipe of a data set that exists or was begun; a plan for another URL may be replaced."""
    store, here = Store.at(data.root, data.name), source_url(data)
    plan = _recorded(store, PLAN_NAME)
    recipe = _recorded(store, MANIFEST_NAME).get("recipe")
    if recipe is None and plan.get("source_url", here) == here:
        recipe = plan.get("recipe")
    return recipe


def _recorded(store: Store, name: str) -> dict[str, Any]:
    """A record of a data set as it is; empty where there is none, or a damaged one."""
    try:
        record = json.loads(store.read_bytes(name))
    except (FileNotFoundError, ValueError):
        return {}
    return cast(dict[str, Any], record) if isinstance(record, dict) else {}
