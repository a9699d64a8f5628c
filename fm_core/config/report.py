"""The report section: the page that shows a run."""

from pydantic import Field

from fm_core.config.section import Section


class ReportSection(Section):
    """The page that shows a run."""

    neighbours: int = Field(default=16, ge=0)
    """Samples shown beside their nearest training images."""
