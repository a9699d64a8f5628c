"""The paper's comparison as one command."""

from fm_core.config import RunConfig
from fm_core.report.html import PageSection
from fm_core.reproduce.image_comparison import images_shown, reproduce_images
from fm_core.reproduce.toy2d.comparison_2d import plane_shown, reproduce_plane
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.storage.atomic_files import read_json


def reproduce(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Make what is missing of the comparison and its page.

    Raises UserError for cells that cannot be or that were made by other settings, StopRequested when asked to
    stop, RuntimeError at the end if a cell failed; the others are kept and shown, and the next call tries
    the failed one again.
    """
    kind = {"plane": reproduce_plane, "images": reproduce_images}[config.reproduce.kind]
    return run_stage_function("reproduce", config, observe, lambda run, show: kind(config, run, show))


def shown(config: RunConfig) -> list[PageSection]:
    """The tables and figures that the page of a comparison shows, from its files; none before the first."""
    results = read_json(RunDirectory(config).path / "reproduce" / "results.json")
    if results is None:
        return []
    kind = {"plane": plane_shown, "images": images_shown}[config.reproduce.kind]
    return kind(config, results)
