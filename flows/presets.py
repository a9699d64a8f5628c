"""The project's configuration files as types of flow parameters.

A flow with a parameter of type `Annotated[RunConfig, DIGITS]` shows the values of infra/configs/digits.yaml
in its form, rejects unknown keys and wrong types when a run is created, and uses the file's values for absent
keys.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
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


class Preset:
    """Annotation of a RunConfig whose defaults are those of infra/configs/<name>.yaml.

    The file is read, and the class and its schema are generated, when a flow first uses the preset: Prefect
    asks for the schema twice for each flow, and pydantic would generate it in 0.05 s each time.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def config_class(self) -> type[RunConfig]:
        """RunConfig with the file's values as defaults."""
        return config_class(load_config(CONFIGS / f"{self.name}.yaml"))

    @cached_property
    def values(self) -> RunConfig:
        """The file's values; the default of the parameter."""
        return self.config_class()

    def __get_pydantic_core_schema__(self, _source: object, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.config_class.model_validate)

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return deepcopy(self._json_schema)

    @cached_property
    def _json_schema(self) -> dict[str, Any]:
        schema = self.config_class.model_json_schema()
        return _without_references(schema, schema.pop("$defs"))


def _without_references(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A JSON schema that contains its definitions in place of references, to be part of another schema."""
    if isinstance(schema, list):
        return [_without_references(part, definitions) for part in cast(list[Any], schema)]
    if not isinstance(schema, dict):
        return schema
    keys = dict(cast(dict[str, Any], schema))
    if reference := keys.pop("$ref", None):
        keys = {**definitions[reference.removeprefix("#/$defs/")], **keys}
    return {name: _without_references(part, definitions) for name, part in keys.items()}


CHECKERBOARD = Preset("checkerboard")
DIGITS = Preset("digits")
IMAGENET32 = Preset("imagenet32")
IMAGENET64 = Preset("imagenet64")
REPRODUCE_CIFAR10 = Preset("reproduce-cifar10")
REPRODUCE_DIGITS = Preset("reproduce-digits")
REPRODUCE_IMAGENET32 = Preset("reproduce-imagenet32")
REPRODUCE_IMAGENET64 = Preset("reproduce-imagenet64")
