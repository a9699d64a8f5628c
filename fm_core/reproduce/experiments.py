"""The experiments of a comparison: objectives on their paths; on images, one run per objective and seed."""

from dataclasses import dataclass

from fm_core.config import ExperimentSection, RunConfig, parse_config
from fm_core.errors import UserError
from fm_core.launch.online_eval import MIN_IMAGES
from fm_core.method.objectives import Objective
from fm_core.method.registry import objective_named, path_named
from fm_core.run.directory import RunDirectory


@dataclass(frozen=True)
class Experiment:
    """One objective with one seed, as a separate run."""

    section: ExperimentSection
    seed: int
    config: RunConfig

    @property
    def title(self) -> str:
        """Name of the objective in tables and figures."""
        return title_of(self.section)

    @property
    def name(self) -> str:
        """Name of the run, and of its directory."""
        return self.config.run.name


def seeds_of(config: RunConfig) -> tuple[int, ...]:
    """Seeds of a comparison: reproduce.seeds, by default run.seed in 2-D and 0 on images."""
    return config.reproduce.seeds or ((config.run.seed,) if config.reproduce.kind == "toy2d" else (0,))


def title_of(section: ExperimentSection) -> str:
    """Name of the objective in tables and figures."""
    return section.title or f"{section.objective}, {section.path}"


def objective_of(section: ExperimentSection) -> Objective:
    """The objective of an experiment on its path.

    Raises:
        UserError: the objective cannot be built; the message names the experiment.
    """
    try:
        path = path_named(section.path, section.path_options)
        return objective_named(section.objective, path, section.objective_options)
    except UserError as error:
        raise UserError(f"reproduce.cells.{section.name}: {error}") from None


def experiments_of(config: RunConfig) -> list[Experiment]:
    """The runs of a comparison on images, seed by seed.

    Raises:
        UserError: an experiment cannot be built, or settings of the comparison do not agree.
    """
    reproduce = config.reproduce
    if not reproduce.cells:
        raise UserError(
            "reproduce.cells is empty; list the experiments, as infra/configs/reproduce-digits.yaml does"
        )
    if "frechet_distance" not in config.evaluate.metrics:
        raise UserError("evaluate.metrics: a comparison needs frechet_distance")
    if 0 < reproduce.images.curve_images < MIN_IMAGES:
        raise UserError(
            f"reproduce.images.curve_images {reproduce.images.curve_images}: a distance needs at least "
            f"{MIN_IMAGES} images; 0 turns the curves off"
        )
    if config.train.keep_checkpoints * config.train.checkpoint_images < config.train.images:
        raise UserError(
            f"train.keep_checkpoints: {config.train.keep_checkpoints} checkpoints, one every "
            f"{config.train.checkpoint_images:,} images, do not cover train.images = "
            f"{config.train.images:,}; the curves need every checkpoint"
        )
    experiments: list[Experiment] = []
    for seed in seeds_of(config):
        for section in reproduce.cells:
            objective_of(section)
            experiments.append(Experiment(section, seed, _run_config(config, section, seed)))
    return experiments


def _run_config(config: RunConfig, section: ExperimentSection, seed: int) -> RunConfig:
    """The comparison's configuration with the objective and path of one experiment, for its run."""
    tree = config.model_dump(mode="json")
    tree["run"] = {
        "root": str(RunDirectory(config).path / "reproduce"),
        "name": f"{section.name}-s{seed}",
        "seed": seed,
        "generator": config.run.generator,
    }
    keys = ("objective", "objective_options", "path", "path_options")
    tree["method"] |= {key: getattr(section, key) for key in keys}
    tree["sample"]["seed"] = config.sample.seed + seed
    if section.steps:
        tree["train"]["images"] = section.steps * config.train.global_batch
    # Keep the checkpoint of every point of the curves, in addition to checkpoints saved at stops.
    tree["train"]["keep_every_images"] = config.train.checkpoint_images
    for key in ("checkpoint_root", "checkpoint_staging"):
        if url := tree["train"][key]:
            tree["train"][key] = f"{url.rstrip('/')}/{section.name}-s{seed}"
    del tree["reproduce"]
    return parse_config(tree, where=f"reproduce.cells.{section.name}")


def flow_matching_ot(experiments: list[Experiment]) -> str:
    """Name of the experiment with flow matching on the OT path; empty if there is none."""
    names = [
        experiment.section.name
        for experiment in experiments
        if (experiment.section.objective, experiment.section.path) == ("flow-matching", "optimal-transport")
    ]
    return names[0] if names else ""
