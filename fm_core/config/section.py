"""Base class and value types of the sections of the configuration tree."""

from contextlib import suppress
from math import isfinite
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Stage = Annotated[
    Literal[1, 2, 3], BeforeValidator(lambda value: int(value) if value in ("1", "2", "3") else value)
]


def _option(value: object) -> object:
    """Convert a number in any notation (YAML reads 1e-5 as a string) to int or float; keep other strings."""
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


class Section(BaseModel):
    """A group of keys; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    preset_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys whose defaults come from a preset (`config_class`)."""

    def given(self, key: str) -> bool:
        """Whether a file, an override or a preset names the key."""
        return key in self.model_fields_set or key in self.preset_keys

    def set_without(self, switch: str, *keys: str) -> list[str]:
        """Those of `keys` that are set although `switch`, which enables them, was omitted.

        Where the switch was given explicitly, the keys are accepted: the user turned it off temporarily, or
        the file lists every key.
        """
        if switch in self.model_fields_set:
            return []
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default()]
