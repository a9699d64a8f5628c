"""What all sections of the configuration tree share."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Number = Annotated[float, AfterValidator(lambda number: int(number) if number.is_integer() else number)]
Stage = Annotated[
    Literal[1, 2, 3], BeforeValidator(lambda word: int(word) if word in ("1", "2", "3") else word)
]
Options = dict[str, Number]


class Section(BaseModel):
    """A closed group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
