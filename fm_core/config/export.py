"""The export section: a model to give away."""

from fm_core.config.section import Section


class ExportSection(Section):
    """A folder with a model that loads anywhere; sample.step and sample.weights say which."""

    folder: str | None = None
    """Where to write it; by default export/<step>-<weights> in the run directory."""
