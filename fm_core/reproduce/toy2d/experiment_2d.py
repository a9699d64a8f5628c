"""The experiments of a 2-D comparison: objectives with their seeds and recipes, and reflow students."""

from dataclasses import dataclass
from typing import Any

from fm_core.config import ExperimentSection, FewStepsSection, RunConfig, StudentSection
from fm_core.errors import UserError
from fm_core.method.couplings import Reflow
from fm_core.method.objectives import Objective
from fm_core.reproduce.experiments import objective_of, seeds_of, title_of
from fm_core.reproduce.toy2d.checkerboard import NAME
from fm_core.run.artifact_cache import ArtifactCache
from fm_core.run.directory import RunDirectory
from fm_core.storage.atomic_files import read_json
from fm_core.storage.keyed_random import (
    CURRENT,
    Domain,
    GeneratorName,
    KeyedRandom,
    generator_of,
    generator_record,
)

_OBJECTIVE_KEYS = {"objective", "objective_options", "path", "path_options"}
_TRAINING_KEYS = {"batch", "learning_rate", "gradient_clip", "width", "layers"}
FEW_STEPS_KEYS = {"solvers", "nfe"}
"""Keys of reproduce.few_steps that affect the scores of a 2-D experiment."""


@dataclass(frozen=True)
class ToyExperiment:
    """One objective and seed of a 2-D comparison, and the location of its cached results."""

    section: ExperimentSection
    name: str
    """Name of its directory: the objective's name, with the seed if it is not run.seed."""
    label: str
    """The title, with the seed and, if smaller than in other experiments, the number of steps."""
    objective: Objective
    steps: int
    cache: ArtifactCache
    recipe: dict[str, Any]
    """Everything that determines the weights."""
    teacher: "ToyExperiment | None" = None
    """The experiment whose model a reflow student begins with and takes its pairs from."""

    @property
    def is_flow_matching_ot(self) -> bool:
        """Whether it is flow matching on the optimal-transport path, with which the others are compared."""
        return (self.section.objective, self.section.path) == ("flow-matching", "optimal-transport")

    def random(self, domain: Domain) -> KeyedRandom:
        """The random numbers of a domain, from the recipe's seed and generator."""
        return KeyedRandom(generator_of(self.recipe, self.name), self.seed, domain)

    @property
    def seed(self) -> int:
        """Seed of data, noise, times and initial weights."""
        return self.recipe["seed"]

    @property
    def pairs(self) -> int:
        """Number of pairs that a reflow student is trained on; 0 for the other experiments."""
        return self.recipe["pairs"] if self.teacher else 0


def toy_experiments(config: RunConfig) -> list[ToyExperiment]:
    """The experiments of a 2-D comparison, seed by seed, those of a seed before its reflow students.

    Raises:
        UserError: an experiment cannot be built, or its directory contains a training with another recipe.
    """
    if not config.reproduce.cells:
        raise UserError(
            "reproduce.cells is empty; list the experiments, as infra/configs/checkerboard.yaml does"
        )
    experiments = list[ToyExperiment]()
    for seed in seeds_of(config):
        own = [_toy_experiment(config, section, seed) for section in config.reproduce.cells]
        experiments += [*own, *_students(config, own)]
    names = [experiment.name for experiment in experiments]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"reproduce: two experiments have the directory {twice}; rename one of them")
    for experiment in experiments:
        experiment.cache.refuse_another("training", experiment.recipe)
    return experiments


def generator_in_2d(config: RunConfig) -> GeneratorName:
    """run.generator; if not set, the generator of the existing comparison, else the default of new ones."""
    if config.run.generator is not None:
        return config.run.generator
    for file in sorted((RunDirectory(config).path / "reproduce").glob("*/training.json")):
        return generator_of((read_json(file) or {}).get("recipe", {}), str(file))
    return CURRENT


def _toy_experiment(config: RunConfig, section: ExperimentSection, seed: int) -> ToyExperiment:
    toy, objective = config.reproduce.toy2d, objective_of(section)
    steps = section.steps or toy.steps
    fewer = f" ({steps:,} of {toy.steps:,} steps)" if steps < toy.steps else ""
    recipe = {
        "data": NAME,
        "seed": seed,
        **generator_record(generator_in_2d(config)),
        "steps": steps,
        **section.model_dump(mode="json", include=_OBJECTIVE_KEYS),
        **toy.model_dump(mode="json", include=_TRAINING_KEYS),
    }
    # With run.seed the name is the objective's, as in versions that supported only one seed.
    name = section.name if seed == config.run.seed else f"{section.name}-s{seed}"
    cache = ArtifactCache(RunDirectory(config).path / "reproduce" / name)
    several = f", seed {seed}" if len(seeds_of(config)) > 1 else ""
    label = title_of(section) + fewer + several
    return ToyExperiment(section, name, label, objective, steps, cache, recipe)


def _students(config: RunConfig, experiments: list[ToyExperiment]) -> list[ToyExperiment]:
    """The reflow students of one seed. Raises UserError if the teacher can have none."""
    few = config.reproduce.few_steps
    teacher = next((each for each in experiments if each.section.name == few.teacher), None)
    if teacher is None or not few.students:
        return []
    coupling = Reflow()
    try:
        teacher.objective.check_coupling(coupling)
        coupling.check_path(teacher.objective.path)
        if teacher.objective.two_times:
            raise UserError("it is a flow map, which is sampled without an ODE")
    except UserError as error:
        where = f"reproduce.few_steps.teacher {few.teacher}"
        raise UserError(f"{where} has no reflow students: {error}") from None
    return [_student(config, teacher, student) for student in few.students]


def _student(config: RunConfig, teacher: ToyExperiment, student: StudentSection) -> ToyExperiment:
    title = student.title or student.name
    changes = {"name": f"{teacher.section.name}-{student.name}", "title": title, "steps": student.steps}
    recipe = {
        **teacher.recipe,
        "steps": student.steps,
        "learning_rate": student.learning_rate,
        "teacher": teacher.recipe,
        "pairs": student.pairs,
    }
    name = f"{teacher.name}-{student.name}"
    several = f", seed {teacher.seed}" if len(seeds_of(config)) > 1 else ""
    return ToyExperiment(
        section=teacher.section.model_copy(update=changes),
        name=name,
        label=f"{title} ({student.steps:,} steps after {title_of(teacher.section)}){several}",
        objective=teacher.objective,
        steps=student.steps,
        cache=ArtifactCache(teacher.cache.directory.with_name(name)),
        recipe=recipe,
        teacher=teacher,
    )


def few_steps_of(config: RunConfig, experiment: ToyExperiment) -> FewStepsSection | None:
    """The comparison at few evaluations of an experiment; None if it has none.

    A reflow student is solved by Euler's method with each number of reproduce.few_steps.student_nfe.
    """
    few = config.reproduce.few_steps
    if experiment.teacher:
        return few.model_copy(update={"solvers": ("euler",), "nfe": few.student_nfe})
    return few if experiment.section.name in few.experiments else None
