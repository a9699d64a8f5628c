"""What all sections of the configuration tree share."""

from contextlib import suppress
from math import isfinite
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Stage = Annotated[
    Literal[1, 2, 3], BeforeValidator(lambda word: int(word) if word in ("1", "2", "3") else word)
]


def _option(value: object) -> object:
    """A number however it is written (YAML takes 1e-5 for a word), whole where it is whole; or a word."""
    if isinstance(value, str) and value.strip(" +-.")[:1].isdigit():
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, bool | int | str):
        return value
    raise PydanticCustomError("option", "a finite number, a word, true or false was expected")


Option = Annotated[bool | int | float | str, BeforeValidator(_option)]
Options = dict[str, Option]
"""What a path, an objective, a coupling or a time distribution takes beside its name."""


class Section(BaseModel):
    """A closed group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def idle(self, switch: str, *keys: str) -> list[str]:
        """Those of `keys` that are set although `switch`, to which they belong, was left out.

        Where the switch was given, somebody has turned it off for once and left the rest standing; or it is a
        file that names every key.
        """
        if switch in self.model_fields_set:
            return []
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default()]
