"""The project's configuration files as types of flow parameters.

A flow with a parameter of type `Annotated[RunConfig, DIGITS.form("run", "data")]` shows these sections with
the values of infra/configs/digits.yaml in its form, rejects their unknown keys and wrong types when a run is
created, and uses the file's values for absent keys. Other sections are accepted as JSON, and are checked when
the run starts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from fm_core.config import RunConfig, config_class, load_config

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "infra" / "configs"
if not CONFIGS.is_dir():
    raise ImportError(
        f"the flows read their presets from {CONFIGS}, which does not exist: they run from a clone of the "
        "project, installed with pip install --editable"
    )
PIPELINE = ("run", "data", "model", "method", "train", "launch", "sample", "evaluate", "report")
"""Sections of the configuration that the stages of a pipeline use."""


class Preset:
    """The values of infra/configs/<name>.yaml, read when a flow first uses them."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def values(self) -> RunConfig:
        """The file's values; the default of the parameter."""
        return load_config(CONFIGS / f"{self.name}.yaml")

    @cached_property
    def config_class(self) -> type[RunConfig]:
        """RunConfig with the file's values as defaults."""
        return config_class(self.values)

    def complete(self, given: object) -> RunConfig:
        """The given keys, of a tree or set in a configuration, and the file's values for others.

        Raises ValidationError.
        """
        if given is self.values:
            return self.values
        keys = given.model_dump(exclude_unset=True) if isinstance(given, RunConfig) else given
        return self.config_class.model_validate(keys)

    def form(self, *sections: str) -> "Form":
        """Annotation of a flow's parameter that shows these sections."""
        return Form(self, sections)


@dataclass(frozen=True)
class Form:
    """Annotation that gives RunConfig the defaults of a preset, and a schema for forms.

    Prefect asks for the schema twice for each flow, and its server checks each key of it whenever the flow is
    deployed. So it is made from one schema of the configuration, which takes pydantic 0.05 s, and contains
    only sections that the flow uses.
    """

    preset: Preset
    sections: tuple[str, ...]

    def __get_pydantic_core_schema__(self, _source: object, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.preset.complete)

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = _with_values(config_schema(), self.preset.values.model_dump(mode="json"))
        for section, part in schema["properties"].items():
            if section not in self.sections:
                # An object without properties is shown as JSON, and its keys are not checked.
                del part["properties"], part["additionalProperties"]
        return schema


@cache
def config_schema() -> dict[str, Any]:
    """The schema of RunConfig, without references."""
    schema = RunConfig.model_json_schema()
    return without_references(schema, schema.pop("$defs"))


def without_references(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A JSON schema with the definitions in place of its references, so that it can be part of another."""
    if isinstance(schema, list):
        return [without_references(part, definitions) for part in cast(list[Any], schema)]
    if not isinstance(schema, dict):
        return schema
    keys = dict(cast(dict[str, Any], schema))
    if reference := keys.pop("$ref", None):
        keys = {**definitions[reference.removeprefix("#/$defs/")], **keys}
    return {name: without_references(part, definitions) for name, part in keys.items()}


def _with_values(schema: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the schema of a section with these values as defaults; former names of keys have none.

    Prefect sorts its forms by position; without it, alphabetically.
    """
    properties = dict(schema["properties"])
    for position, (name, value) in enumerate(values.items()):
        part = properties[name]
        if "properties" in part:
            # As pydantic titles other keys; that of a section would be the name of its class.
            part = {**_with_values(part, value), "title": name.replace("_", " ").title()}
        properties[name] = {**part, "default": value, "position": position}
    return {**schema, "properties": properties}


CHECKERBOARD = Preset("checkerboard")
DIGITS = Preset("digits")
IMAGENET32 = Preset("imagenet32")
IMAGENET64 = Preset("imagenet64")
REPRODUCE_CIFAR10 = Preset("reproduce-cifar10")
REPRODUCE_DIGITS = Preset("reproduce-digits")
REPRODUCE_IMAGENET32 = Preset("reproduce-imagenet32")
REPRODUCE_IMAGENET64 = Preset("reproduce-imagenet64")
