"""The cells of a comparison: which objectives, and on images the plain run of each with each seed."""

from dataclasses import dataclass

from fm_core.config import ExperimentSection, RunConfig, parse_config
from fm_core.errors import UserError
from fm_core.launch.online_eval import MIN_IMAGES
from fm_core.method.objectives import Objective
from fm_core.method.registry import objective_named, path_named
from fm_core.run.directory import RunDirectory


@dataclass(frozen=True)
class Experiment:
    """An objective with one seed, as a run of its own."""

    section: ExperimentSection
    seed: int
    config: RunConfig

    @property
    def title(self) -> str:
        """What tables call the objective."""
        return title_of(self.section)

    @property
    def name(self) -> str:
        """Name of the run, and of its directory."""
        return self.config.run.name


def title_of(section: ExperimentSection) -> str:
    """What tables call the objective."""
    return section.title or f"{section.objective}, {section.path}"


def objective_of(section: ExperimentSection) -> Objective:
    """The objective of a cell on its path. UserError, with the cell's name, for one that cannot be."""
    try:
        path = path_named(section.path, section.path_options)
        return objective_named(section.objective, path, section.objective_options)
    except UserError as error:
        raise UserError(f"reproduce.cells.{section.name}: {error}") from None


def experiments_of(config: RunConfig) -> list[Experiment]:
    """The runs of a comparison on images, seed by seed. Raises UserError for cells that cannot be."""
    reproduce = config.reproduce
    if not reproduce.cells:
        raise UserError(
            "reproduce.cells is empty; name what to compare, as infra/configs/reproduce-digits.yaml does"
        )
    if "frechet_distance" not in config.evaluate.metrics:
        raise UserError("evaluate.metrics: a comparison needs frechet_distance")
    if 0 < reproduce.images.curve_images < MIN_IMAGES:
        raise UserError(
            f"reproduce.images.curve_images {reproduce.images.curve_images}: a distance needs at least "
            f"{MIN_IMAGES}; 0 leaves the curves out"
        )
    if config.train.keep_checkpoints * config.train.checkpoint_images < config.train.images:
        raise UserError(
            f"train.keep_checkpoints: {config.train.keep_checkpoints} checkpoints, one every "
            f"{config.train.checkpoint_images:,} images, do not reach over train.images = "
            f"{config.train.images:,}; the curves need them all"
        )
    cells: list[Experiment] = []
    for seed in reproduce.images.seeds:
        for section in reproduce.cells:
            objective_of(section)
            cells.append(Experiment(section, seed, _config_of(config, section, seed)))
    return cells


def _config_of(config: RunConfig, section: ExperimentSection, seed: int) -> RunConfig:
    """What a cell's run is asked: the comparison's own configuration but for the objective and its path."""
    tree = config.model_dump(mode="json")
    tree["run"] = {
        "root": str(RunDirectory(config).path / "reproduce"),
        "name": f"{section.name}-s{seed}",
        "seed": seed,
    }
    keys = ("objective", "objective_options", "path", "path_options")
    tree["method"] |= {key: getattr(section, key) for key in keys}
    tree["sample"]["seed"] = config.sample.seed + seed
    if section.steps:
        tree["train"]["images"] = section.steps * config.train.global_batch
    # Every point of the curves stays, whatever a stop saves besides.
    tree["train"]["keep_every_images"] = config.train.checkpoint_images
    for key in ("checkpoint_root", "checkpoint_staging"):
        if where := tree["train"][key]:
            tree["train"][key] = f"{where.rstrip('/')}/{section.name}-s{seed}"
    del tree["reproduce"]
    return parse_config(tree, where=f"reproduce.cells.{section.name}")


def ours(cells: list[Experiment]) -> str:
    """The cell that the paper's claims are about; empty if there is none."""
    asked = ("flow-matching", "optimal-transport")
    found = [c.section.name for c in cells if (c.section.objective, c.section.path) == asked]
    return found[0] if found else ""
