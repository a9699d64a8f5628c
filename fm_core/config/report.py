"""The report section: the HTML report of a run."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from fm_core.config.location import Location
from fm_core.config.section import Section


class ReportSection(Section):
    """The HTML report of a run."""

    aliases: ClassVar[Mapping[str, str]] = {"neighbours": "neighbors"}

    neighbors: int = Field(default=16, ge=0)
    """Number of samples shown next to their nearest training images."""
    pictures: Location | None = None
    """Folder or URL to which the pictures of the page, also of fm reproduce, are written as PNG files."""
