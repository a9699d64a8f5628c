"""Base class and value types of the sections of the configuration tree."""

from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Stage = Annotated[
    Literal[1, 2, 3], BeforeValidator(lambda value: int(value) if value in ("1", "2", "3") else value)
]


def _option(value: object) -> object:
    """Convert a number in any notation (YAML parses 1e-5 as a string) to int or float; keep other strings."""
    if isinstance(value, str) and value.strip(" +-.")[:1].isdigit():
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, bool | int | str):
        return value
    raise PydanticCustomError("option", "expected a finite number, a string, true or false")


Option = Annotated[bool | int | float | str, BeforeValidator(_option)]
Options = dict[str, Option]
"""Options of a path, an objective, a coupling or a time distribution."""


def _add_aliases(schema: dict[str, Any], section: type[BaseModel]) -> None:
    """Let a closed schema accept aliases too; without a default, forms do not submit them."""
    for alias, key in cast(type[Section], section).aliases.items():
        described = schema["properties"][key]
        shared = {name: value for name, value in described.items() if name != "default"}
        schema["properties"][alias] = {**shared, "title": f"{alias} (alias of {key})", "deprecated": True}


class Section(BaseModel):
    """A group of keys; unknown keys are rejected."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        json_schema_extra=cast(Any, _add_aliases),
    )

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other accepted names of keys, such as former names, mapped to the key."""

    preset_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys whose defaults come from a preset (`config_class`)."""

    @model_validator(mode="before")
    @classmethod
    def _rename_aliases(cls, keys: Any) -> Any:
        if not isinstance(keys, dict) or not cls.aliases.keys() & keys.keys():
            return keys
        named = cast(dict[str, Any], keys)
        for alias, key in cls.aliases.items():
            if alias in named and key in named:
                raise PydanticCustomError("alias", "{alias} {key}", {"alias": alias, "key": key})
        return {cls.aliases.get(name, name): value for name, value in named.items()}

    def given(self, key: str) -> bool:
        """Whether a file, an override or a preset sets the key."""
        return key in self.model_fields_set or key in self.preset_keys

    def set_without(self, switch: str, *keys: str) -> list[str]:
        """The `keys` that are set although `switch`, which enables them, was omitted.

        If the switch is given explicitly, the keys are accepted: the user may have turned it off temporarily,
        or the file lists every key.
        """
        if switch in self.model_fields_set:
            return []
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default()]
