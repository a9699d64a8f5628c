"""The stage that reproduces the paper's comparison, in 2-D or on images."""

from fm_core.config import RunConfig
from fm_core.report.html import PageSection, page_pictures
from fm_core.reproduce.image_comparison import image_page_sections, reproduce_images
from fm_core.reproduce.toy2d.comparison_2d import page_sections_2d, reproduce_2d
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_functions import StageFunctions
from fm_core.run.stage_runner import run_stage_function
from fm_core.storage.atomic_files import read_json
from fm_core.storage.store import Store


def reproduce(config: RunConfig, observe: Observer = no_progress, *, stages: StageFunctions) -> StageResult:
    """Run the experiments of the comparison that are missing, and write its page.

    `stages` are the stages of the experiments on images.

    Raises:
        UserError: an experiment cannot be built or was made with other settings.
        StopRequested: the stage was asked to stop.
        RuntimeError: at the end, if an experiment failed; the others are retained and reported, and the next
            call retries the failed experiment.
    """

    def work(run: RunDirectory, show: Observer) -> StageResult:
        if config.reproduce.kind == "toy2d":
            result = reproduce_2d(config, run, show)
        else:
            result = reproduce_images(config, run, show, stages)
        if config.report.pictures:
            store = Store.at(config.report.pictures)
            for name, (picture, _) in page_pictures("comparison", page_sections(config)).items():
                store.write_bytes(f"{name}.png", picture)
        # Each experiment is bound to its own configuration from its first step on.
        run.bind()
        return result

    return run_stage_function("reproduce", config, observe, work)


def page_sections(config: RunConfig) -> list[PageSection]:
    """The tables and figures of a comparison's page, from its files; empty if there are no results yet."""
    results = read_json(RunDirectory(config).path / "reproduce" / "results.json")
    if results is None:
        return []
    kind = {"toy2d": page_sections_2d, "images": image_page_sections}[config.reproduce.kind]
    return kind(config, results)
