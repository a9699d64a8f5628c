"""What can be refused before anything is spent."""

from fm_core.config import RunConfig
from fm_core.data.shards import check_source
from fm_core.run.directory import RunDirectory
from fm_core.sampling.store import solver_of
from fm_core.stages import train


def preflight(config: RunConfig) -> None:
    """Check sources, directories, sizes that must divide, and settings that must agree.

    Raises UserError in one line for the first thing that is wrong.
    """
    check_source(config.data)
    RunDirectory(config).open()
    train.check(config)
    solver_of(config)
