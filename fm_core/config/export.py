"""The export section: exporting a trained model."""

from fm_core.config.location import Location
from fm_core.config.section import Section


class ExportSection(Section):
    """A self-contained folder with the model that sample.step and sample.weights select."""

    folder: Location | None = None
    """Folder to write; by default export/<step>-<weights> in the run directory."""
