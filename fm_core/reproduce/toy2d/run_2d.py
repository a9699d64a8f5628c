"""Training and scoring of the experiments in 2-D, each cached by its recipe."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fm_core.config import FewStepsSection, RunConfig
from fm_core.errors import LeaseLostError, StopRequested
from fm_core.reproduce.toy2d.experiment_2d import FEW_STEPS_KEYS, ToyExperiment, few_steps_of
from fm_core.reproduce.toy2d.few_evaluations import DISTANCE
from fm_core.reproduce.toy2d.fit import Examples, draw, fit, initial_network
from fm_core.reproduce.toy2d.reflow_2d import solve_pairs
from fm_core.reproduce.toy2d.scoring import score_model
from fm_core.run.artifact_cache import CachedPart
from fm_core.run.directory import RunDirectory, environment
from fm_core.run.progress import Observer, Progress, RateMeter
from fm_core.storage.atomic_files import write_json, write_text
from fm_core.storage.keyed_random import Domain

TRAINING_PARTS, SCORING_PARTS = 1000, 600
"""Parts of an experiment's work in the progress bar, roughly in proportion to their time."""

_SCORING_KEYS = {"held_out", "samples", "nfe", "rtol", "atol", "grid"}


@dataclass(frozen=True)
class ToyOutcome:
    """Outcome of an experiment."""

    experiment: ToyExperiment
    record: dict[str, Any]
    """Content of its result.json; empty if it failed."""
    changed: bool = False
    """Whether any part of it was computed by this call."""
    error: str = ""


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


def _train_and_score(
    experiment: ToyExperiment, config: RunConfig, progress: "ToyProgress"
) -> tuple[dict[str, Any], bool]:
    """The content of result.json, and whether any part of the experiment was computed by this call."""
    toy, seed, cache = config.reproduce.toy2d, experiment.seed, experiment.cache
    network = initial_network(toy, seed, experiment.objective.two_times)
    few = few_steps_of(config, experiment)
    trained = _finished_training(experiment)
    if trained:
        progress.skip()
    training = trained or _train(experiment, network, config, progress)
    recipe = {
        "weights": training.tensors_sha256,
        **toy.model_dump(mode="json", include=_SCORING_KEYS),
        **({"few_steps": _few_steps_recipe(few)} if few else {}),
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


def _few_steps_recipe(few: FewStepsSection) -> dict[str, Any]:
    return {**few.model_dump(mode="json", include=FEW_STEPS_KEYS), "distance": DISTANCE}


def _finished_training(experiment: ToyExperiment) -> CachedPart | None:
    """The training of an experiment if it is complete and, for a student, from its teacher's weights."""
    trained = experiment.cache.read("training", "weights")
    if trained and experiment.teacher and trained.record["teacher_sha256"] != _teacher_sha256(experiment):
        return None
    return trained


def _teacher_sha256(experiment: ToyExperiment) -> str | None:
    """Hash of the teacher's weights; None without a teacher. Raises RuntimeError if they are missing."""
    if experiment.teacher is None:
        return None
    trained = experiment.teacher.cache.read("training", "weights")
    if trained is None:
        raise RuntimeError(f"its teacher {experiment.teacher.label} has no weights; it failed or is damaged")
    return trained.tensors_sha256


def _train(
    experiment: ToyExperiment, network: nn.Module, config: RunConfig, progress: "ToyProgress"
) -> CachedPart:
    clock, cpu = time.monotonic(), time.process_time()
    on_step = partial(progress.trained, experiment.label, experiment.steps)
    toy = config.reproduce.toy2d.model_copy(update={"learning_rate": experiment.recipe["learning_rate"]})
    teacher = _teacher_sha256(experiment)
    examples = _examples(experiment, network, progress)
    losses = fit(network, experiment.objective, toy, experiment.steps, examples, on_step)
    record = {
        "recipe": experiment.recipe,
        **({"teacher_sha256": teacher} if teacher else {}),
        "steps": experiment.steps,
        "training_seconds": round(time.monotonic() - clock, 2),
        "training_cpu_seconds": round(time.process_time() - cpu, 2),
        "loss_by_hundredths": losses,
        "made_with": _versions(),
    }
    return experiment.cache.write("training", "weights", record, network.state_dict())


def _examples(experiment: ToyExperiment, network: nn.Module, progress: "ToyProgress") -> Examples:
    """The training examples; for a reflow student, `network` gets its teacher's weights."""
    random, teacher = experiment.random(Domain.TOY2D), experiment.teacher
    if teacher is None:
        return partial(draw, experiment.objective, random)
    network.load_state_dict(teacher.cache.tensors("weights"))
    on_part = partial(progress.solved, experiment.label, experiment.pairs)
    pairs = solve_pairs(network, experiment.objective, random, experiment.pairs, on_part)
    return partial(pairs.draw, experiment.objective, random)


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

    def solved(self, label: str, pairs: int, solved: int) -> None:
        """Report solved pairs of a reflow student, before its training."""
        self._report(0, f"{label}: {solved:,} of {pairs:,} pairs")

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
