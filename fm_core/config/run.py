"""The run section: name, directory and seed."""

from pydantic import Field

from fm_core.config.location import Location
from fm_core.config.section import Name, Section


class RunSection(Section):
    """Name and directory of a run, and the seed of everything random in it."""

    name: Name = "run"
    """Name of the run; its directory is <run.root>/<run.name>."""
    root: Location = "runs"
    """Directory that holds the run directories; a path of the submitting host."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of data order, noise, times, dequantization, initial weights and samples."""
