"""The run section: name, directory and seed."""

from typing import Literal

from pydantic import Field

from fm_core.config.location import Location
from fm_core.config.section import Name, Section

GeneratorName = Literal["philox-v1", "numpy-v1"]
NEW_GENERATOR: GeneratorName = "philox-v1"
"""Generator of new runs."""


class RunSection(Section):
    """Name and directory of a run, and the seed of all its random numbers."""

    name: Name = "run"
    """Name of the run; its directory is <run.root>/<run.name>."""
    root: Location = "runs"
    """Parent directory of run directories, on the submitting host."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of data order, noise, times, dequantization, initial weights and samples."""
    generator: GeneratorName | None = None
    """Generator of noise, times, dequantization, flips, label dropout, probes and samples. philox-v1: Philox
    4x32-10, computed on the device; numpy-v1: numpy's, on the CPU, as in earlier versions. By default
    philox-v1 for a new run, and for an existing one the generator that it started with."""
