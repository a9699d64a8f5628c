"""The launch section: the processes."""

from typing import Literal

from pydantic import Field

from fm_core.config.section import Section


class LaunchSection(Section):
    """The processes that train and sample."""

    kind: Literal["local"] = "local"
    """local: torchrun on this machine."""
    processes: int | None = Field(default=None, ge=1)
    """Processes; by default one per GPU, or two where there is none."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; by default the cores over the processes."""
    restarts: int = Field(default=3, ge=0)
    """How often a job that fails (a killed process, a lost host) is started again by itself."""
    restart_seconds: float = Field(default=5.0, ge=0)
    """Pause before the first restart, in seconds; it doubles from one to the next, up to five minutes."""
