"""One experiment in 2-D: training and scoring of one objective, each cached by its recipe."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fm_core.config import ExperimentSection, FewStepsSection, RunConfig
from fm_core.errors import LeaseLostError, StopRequested, UserError
from fm_core.method.objectives import Objective
from fm_core.reproduce.experiments import objective_of, seeds_of, title_of
from fm_core.reproduce.toy2d.checkerboard import NAME
from fm_core.reproduce.toy2d.fit import fit, initial_network
from fm_core.reproduce.toy2d.scoring import score_model
from fm_core.run.artifact_cache import ArtifactCache, CachedPart
from fm_core.run.directory import RunDirectory, environment
from fm_core.run.progress import Observer, Progress, RateMeter
from fm_core.storage.atomic_files import read_json, write_json, write_text
from fm_core.storage.keyed_random import (
    CURRENT,
    Domain,
    GeneratorName,
    KeyedRandom,
    generator_of,
    generator_record,
)

TRAINING_PARTS, SCORING_PARTS = 1000, 600
"""Parts of an experiment's work in the progress bar, roughly in proportion to their time."""

_OBJECTIVE_KEYS = {"objective", "objective_options", "path", "path_options"}
_TRAINING_KEYS = {"batch", "learning_rate", "gradient_clip", "width", "layers"}
_SCORING_KEYS = {"held_out", "samples", "nfe", "rtol", "atol", "grid"}
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

    def random(self, domain: Domain) -> KeyedRandom:
        """The random numbers of a domain, from the recipe's seed and generator."""
        return KeyedRandom(generator_of(self.recipe, self.name), self.seed, domain)

    @property
    def seed(self) -> int:
        """Seed of data, noise, times and initial weights."""
        return self.recipe["seed"]


@dataclass(frozen=True)
class ToyOutcome:
    """Outcome of an experiment."""

    experiment: ToyExperiment
    record: dict[str, Any]
    """Content of its result.json; empty if it failed."""
    changed: bool = False
    """Whether any part of it was computed by this call."""
    error: str = ""


def toy_experiments(config: RunConfig) -> list[ToyExperiment]:
    """The experiments of a 2-D comparison, seed by seed.

    Raises:
        UserError: an experiment cannot be built, or its directory contains a training with another recipe.
    """
    if not config.reproduce.cells:
        raise UserError(
            "reproduce.cells is empty; list the experiments, as infra/configs/checkerboard.yaml does"
        )
    seeds = seeds_of(config)
    experiments = [_toy_experiment(config, section, s) for s in seeds for section in config.reproduce.cells]
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


def run_toy_experiment(
    experiment: ToyExperiment, config: RunConfig, run: RunDirectory, progress: "ToyProgress"
) -> ToyOutcome:
    """Run an experiment, or verify it if complete. Any error except StopRequested becomes its outcome."""
    progress.start(experiment.label)
    try:
        record, changed = _train_and_score(experiment, config, progress)
        experiment.cache.failure.unlink(missing_ok=True)
        return ToyOutcome(experiment, record, changed)
    except (LeaseLostError, StopRequested):
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        write_json(experiment.cache.failure, {"error": message})
        write_text(run.log("reproduce", experiment.name), traceback.format_exc())
        return ToyOutcome(experiment, {}, error=message)


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


def few_steps_of(config: RunConfig, section: ExperimentSection) -> FewStepsSection | None:
    """The comparison at few evaluations of an experiment; None if it has none."""
    few = config.reproduce.few_steps
    return few if section.name in few.experiments else None


def _train_and_score(
    experiment: ToyExperiment, config: RunConfig, progress: "ToyProgress"
) -> tuple[dict[str, Any], bool]:
    """The content of result.json, and whether any part of the experiment was computed by this call."""
    toy, seed, cache = config.reproduce.toy2d, experiment.seed, experiment.cache
    network = initial_network(toy, seed, experiment.objective.two_times)
    few = few_steps_of(config, experiment.section)
    trained = cache.read("training", "weights")
    if trained:
        progress.skip()
    training = trained or _train(experiment, network, config, progress)
    recipe = {
        "weights": training.tensors_sha256,
        **toy.model_dump(mode="json", include=_SCORING_KEYS),
        **({"few_steps": few.model_dump(mode="json", include=FEW_STEPS_KEYS)} if few else {}),
    }
    scored = cache.read("result", "pictures")
    if trained and scored and scored.record["scoring"] == recipe:
        return scored.record, False
    network.load_state_dict(cache.tensors("weights"))
    clock, cpu = time.monotonic(), time.process_time()
    on_part = partial(progress.scored, experiment.label)
    random = experiment.random(Domain.TOY2D_SCORING)
    evaluation = score_model(network, experiment.objective, toy, random, on_part, few)
    keys = ("recipe", "steps", "training_seconds", "training_cpu_seconds")
    record = {
        **{key: training.record[key] for key in keys},
        "scoring": recipe,
        "weights_sha256": training.tensors_sha256,
        **evaluation.scores,
        "scoring_seconds": round(time.monotonic() - clock, 2),
        "scoring_cpu_seconds": round(time.process_time() - cpu, 2),
        "made_with": _versions(),
    }
    return cache.write("result", "pictures", record, evaluation.tensors).record, True


def _train(
    experiment: ToyExperiment, network: nn.Module, config: RunConfig, progress: "ToyProgress"
) -> CachedPart:
    clock, cpu = time.monotonic(), time.process_time()
    on_step = partial(progress.trained, experiment.label, experiment.steps)
    random = experiment.random(Domain.TOY2D)
    losses = fit(network, experiment.objective, config.reproduce.toy2d, experiment.steps, random, on_step)
    record = {
        "recipe": experiment.recipe,
        "steps": experiment.steps,
        "training_seconds": round(time.monotonic() - clock, 2),
        "training_cpu_seconds": round(time.process_time() - cpu, 2),
        "loss_by_hundredths": losses,
        "made_with": _versions(),
    }
    return experiment.cache.write("training", "weights", record, network.state_dict())


def _versions() -> dict[str, Any]:
    versions = environment()["versions"]
    return {"threads": torch.get_num_threads(), **{key: versions[key] for key in ("torch", "torchdiffeq")}}


class ToyProgress:
    """Progress over all experiments, each with TRAINING_PARTS for training and SCORING_PARTS for scoring."""

    def __init__(self, experiments: int, observe: Observer, check_stop: Callable[[], None]) -> None:
        self._total = experiments * (TRAINING_PARTS + SCORING_PARTS)
        self._observe, self._check_stop, self._rate = observe, check_stop, RateMeter()
        self._current = -1

    def start(self, label: str) -> None:
        """Begin the next experiment."""
        self._current += 1
        self._report(0, label)

    def skip(self) -> None:
        """Exclude earlier work from the rate."""
        self._rate = RateMeter()

    def trained(self, label: str, steps: int, step: int, loss: float) -> None:
        """Report a training step."""
        message = f"{label}: step {step:,} of {steps:,}, loss {loss:.3f}"
        self._report(TRAINING_PARTS * step // steps, message)

    def scored(self, label: str, share: float, message: str) -> None:
        """Report a finished share, 0 to 1, of the scoring."""
        self._report(TRAINING_PARTS + int(SCORING_PARTS * share), f"{label}: {message}")

    def finish(self, message: str) -> None:
        """Report that everything is done."""
        self._observe(Progress("reproduce", self._total, self._total, "parts", message))

    def _report(self, parts: int, message: str) -> None:
        self._check_stop()
        done = min(self._current * (TRAINING_PARTS + SCORING_PARTS) + parts, self._total - 1)
        self._observe(Progress("reproduce", done, self._total, "parts", message, self._rate.rate(done)))
