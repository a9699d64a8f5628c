"""Values of the keys that a configuration does not name: those of the run, or derived from its data set.

Every stage resolves its configuration first, so that a file which names only data.source.url and
data.source.image_size means the same run at every stage. A run that was trained keeps the values that its
config.yaml records, whatever a later version would derive.
"""

import json

from fm_core.config import RunConfig
from fm_core.config.derived_defaults import (
    DatasetSize,
    absent_keys,
    dataset_name,
    validation_images_for,
    with_derived,
    with_values_of,
)
from fm_core.data.dataset_builder import read_complete
from fm_core.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from fm_core.data.shard_plan import PLAN_NAME, make_plan
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
    if not absent_keys(config):
        return config
    bound = RunDirectory(config).bound_config()
    if bound is not None:
        return with_values_of(config, bound)
    try:
        config = _with_data_keys(config)
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
    if not absent_keys(config).get("data"):
        return config
    bound = RunDirectory(config).bound_config()
    return _with_data_keys(config) if bound is None else with_values_of(config, bound)


def _planned_size(config: RunConfig) -> DatasetSize:
    if (manifest := read_complete(config.data)) is not None:
        return _size_of(manifest)
    plan = make_plan(config.data)
    images = sum(task.rows for task in plan.tasks if task.split == "train")
    return DatasetSize(plan.source.facts.image_shape[-1], images)


def _size_of(manifest: Manifest) -> DatasetSize:
    return DatasetSize(manifest.image_shape[-1], manifest.splits["train"].images)


def _with_data_keys(config: RunConfig) -> RunConfig:
    absent, data = absent_keys(config).get("data", []), config.data
    if "name" in absent:
        data = data.model_copy(update={"name": dataset_name(data)})
    if "validation_images" in absent:
        recorded = _recorded_validation_images(Store.at(data.root, data.name))
        if recorded is None:
            source = open_source(data.model_copy(update={"validation_images": 1}))
            if "validation_images" in source.facts.recipe:
                recorded = validation_images_for(sum(part.rows for part in source.parts()))
        if recorded is not None:
            data = data.model_copy(update={"validation_images": recorded})
    return config.model_copy(update={"data": data})


def _recorded_validation_images(store: Store) -> int | None:
    """data.validation_images of a data set that exists or was begun."""
    for name in (MANIFEST_NAME, PLAN_NAME):
        try:
            return int(json.loads(store.read_bytes(name))["recipe"]["validation_images"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
    return None
