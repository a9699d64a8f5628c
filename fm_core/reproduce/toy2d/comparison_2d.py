"""The paper's comparison in the plane: every objective trained, scored and drawn, cell by cell."""

import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fm_core.config import ExperimentSection, PlaneSection, RunConfig
from fm_core.errors import StopRequested, UserError
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.method.compatibility import require_diffusion_path
from fm_core.method.objectives import Objective
from fm_core.method.paths import Path
from fm_core.report.html import PageSection
from fm_core.reproduce.experiments import objective_of, title_of
from fm_core.reproduce.toy2d.checkerboard import ENTROPY, NAME
from fm_core.reproduce.toy2d.figures import Shown
from fm_core.reproduce.toy2d.fit import fit, initial_network
from fm_core.reproduce.toy2d.page import plane_page, plane_sections
from fm_core.reproduce.toy2d.scoring import LIKELIHOOD_BATCH, PICTURE_TOLERANCE, judge
from fm_core.run.artifact_cache import ArtifactCache, CachedPart, exclusive_lock
from fm_core.run.directory import RunDirectory, environment
from fm_core.run.progress import Observer, Progress, RateMeter
from fm_core.run.results import StageResult
from fm_core.storage.atomic_files import SCHEMA, read_json, write_json, write_text
from fm_core.storage.hashing import fingerprint

TRAINING, SCORING = 1000, 600
"""Parts of a cell's work, for the progress bar: about the shares of its time."""
FINGERPRINT_MARK = "<!-- made from "


_WHAT = {"objective", "objective_options", "path", "path_options"}
_HOW = {"batch", "learning_rate", "gradient_clip", "width", "layers"}
_JUDGED_BY = {"held_out", "samples", "nfe", "rtol", "atol", "grid"}


@dataclass(frozen=True)
class ToyExperiment:
    """A cell that is to be there."""

    section: ExperimentSection
    label: str
    objective: Objective
    steps: int
    cell: ArtifactCache
    recipe: dict[str, Any]
    """What makes the weights what they are."""


@dataclass(frozen=True)
class ToyOutcome:
    """A cell after its turn."""

    task: ToyExperiment
    record: dict[str, Any]
    """Its result.json; empty if it failed."""
    made: bool = False
    error: str = ""


def check(config: RunConfig) -> list[ToyExperiment]:
    """Refuse what can be refused before anything is spent. Raises UserError."""
    if not config.reproduce.cells:
        raise UserError(
            "reproduce.cells is empty; name what to compare, as infra/configs/checkerboard.yaml does"
        )
    tasks = [_task(config, section) for section in config.reproduce.cells]
    for task in tasks:
        task.cell.refuse_another("training", task.recipe)
    return tasks


def _task(config: RunConfig, section: ExperimentSection) -> ToyExperiment:
    plane, objective = config.reproduce.plane, objective_of(section)
    steps = section.steps or plane.steps
    fewer = f" ({steps:,} of {plane.steps:,} steps)" if steps < plane.steps else ""
    recipe = {
        "data": NAME,
        "seed": config.run.seed,
        "steps": steps,
        **section.model_dump(mode="json", include=_WHAT),
        **plane.model_dump(mode="json", include=_HOW),
    }
    cell = ArtifactCache(RunDirectory(config).path / "reproduce" / section.name)
    return ToyExperiment(section, title_of(section) + fewer, objective, steps, cell, recipe)


def reproduce_plane(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    """Make what is missing; UserError for cells that cannot be, RuntimeError at the end if one failed."""
    tasks = check(config)
    directory = run.path / "reproduce"
    threads = config.launch.threads or torch.get_num_threads()
    with exclusive_lock(directory) as beat, cpu_threads(threads):
        bar = _Parts(len(tasks), observe, beat)
        outcomes = [_turn(task, config, run, bar) for task in tasks]
        written = _write_results(config, run, outcomes)
    failed = [outcome for outcome in outcomes if outcome.error]
    paths = {"report": str(directory / "report.html"), "results": str(directory / "results.json")}
    if failed:
        listed = "; ".join(f"{outcome.task.section.name}: {outcome.error}" for outcome in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(tasks)} cells failed ({listed}); the others are in {paths['report']}; "
            "run it again to try the failed ones again"
        )
    made = written or any(outcome.made for outcome in outcomes)
    bar.finish(paths["report"])
    return StageResult(
        stage="reproduce",
        state="done" if made else "verified",
        seconds=0.0,
        summary=f"{len(tasks)} objectives compared; {paths['report']}",
        paths=paths,
        counts={f"nll_nats_{o.task.section.name}": o.record["nll"]["nats"] for o in outcomes},
        hashes={outcome.task.section.name: outcome.record["weights_sha256"] for outcome in outcomes},
    )


def _turn(task: ToyExperiment, config: RunConfig, run: RunDirectory, bar: "_Parts") -> ToyOutcome:
    """Make a cell or find it made; whatever goes wrong in it stays in it. Raises StopRequested."""
    bar.start(task.label)
    try:
        record, made = _cell(task, config, bar)
        task.cell.failure.unlink(missing_ok=True)
        return ToyOutcome(task, record, made)
    except StopRequested:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        write_json(task.cell.failure, {"error": said})
        write_text(run.log("reproduce", task.section.name), traceback.format_exc())
        return ToyOutcome(task, {}, error=said)


def _cell(task: ToyExperiment, config: RunConfig, bar: "_Parts") -> tuple[dict[str, Any], bool]:
    """The cell's result.json, and whether any of it had to be made."""
    plane, seed = config.reproduce.plane, config.run.seed
    network = initial_network(plane, seed)
    trained = task.cell.read("training", "weights")
    if trained:
        bar.found()
    training = trained or _train(task, network, config, bar)
    recipe = _scoring_recipe(plane, training)
    finished = task.cell.read("result", "pictures")
    if trained and finished and finished.record["scoring"] == recipe:
        return finished.record, False
    network.load_state_dict(task.cell.tensors("weights"))
    clock, cpu = time.monotonic(), time.process_time()
    judged = judge(network, task.objective, plane, seed, partial(bar.scored, task.label))
    kept = {
        key: training.record[key] for key in ("recipe", "steps", "training_seconds", "training_cpu_seconds")
    }
    record = {
        **kept,
        "scoring": recipe,
        "weights_sha256": training.tensors_sha256,
        **judged.scores,
        "scoring_seconds": round(time.monotonic() - clock, 2),
        "scoring_cpu_seconds": round(time.process_time() - cpu, 2),
        "made_with": _made_with(),
    }
    return task.cell.write("result", "pictures", record, judged.pictures).record, True


def _train(task: ToyExperiment, network: nn.Module, config: RunConfig, bar: "_Parts") -> CachedPart:
    clock, cpu = time.monotonic(), time.process_time()
    on_step = partial(bar.trained, task.label, task.steps)
    losses = fit(network, task.objective, config.reproduce.plane, task.steps, config.run.seed, on_step)
    record = {
        "recipe": task.recipe,
        "steps": task.steps,
        "training_seconds": round(time.monotonic() - clock, 2),
        "training_cpu_seconds": round(time.process_time() - cpu, 2),
        "loss_by_hundredths": losses,
        "made_with": _made_with(),
    }
    return task.cell.write("training", "weights", record, network.state_dict())


def _scoring_recipe(plane: PlaneSection, training: CachedPart) -> dict[str, Any]:
    return {"weights": training.tensors_sha256, **plane.model_dump(mode="json", include=_JUDGED_BY)}


def _made_with() -> dict[str, Any]:
    versions = environment()["versions"]
    return {"threads": torch.get_num_threads(), **{key: versions[key] for key in ("torch", "torchdiffeq")}}


def _write_results(config: RunConfig, run: RunDirectory, outcomes: list[ToyOutcome]) -> bool:
    """Write results.json and report.html unless they show just this already; whether they were written."""
    finished = [outcome for outcome in outcomes if not outcome.error]
    paths = {task.section.path: task.objective.path for task in (outcome.task for outcome in outcomes)}
    results = {
        "kind": config.reproduce.kind,
        "protocol": _protocol(config),
        "entropy": {"nats": ENTROPY, "bits": ENTROPY / math.log(2)},
        "diffusion_paths": [name for name, path in paths.items() if _is_diffusion(path)],
        "cells": {o.task.section.name: {"label": o.task.label, **_plain(o.record)} for o in finished},
        "failed": {o.task.section.name: f"{o.task.label}: {o.error}" for o in outcomes if o.error},
    }
    directory = run.path / "reproduce"
    page_file, mark = directory / "report.html", f"{FINGERPRINT_MARK}{fingerprint(results)} -->\n"
    same = read_json(directory / "results.json") == {"schema": SCHEMA, **json.loads(json.dumps(results))}
    if same and page_file.exists() and page_file.read_text(encoding="utf-8").endswith(mark):
        return False
    shown = [Shown(o.task.label, o.task.cell.tensors("pictures")) for o in finished]
    write_text(page_file, plane_page(results, shown, paths) + mark)
    write_json(directory / "results.json", results)
    return True


def plane_shown(config: RunConfig, results: dict[str, Any]) -> list[PageSection]:
    """The tables and figures of a comparison whose results.json is given. Raises UserError as `check`."""
    tasks = check(config)
    made = [task for task in tasks if task.section.name in results["cells"]]
    shown = [Shown(task.label, task.cell.tensors("pictures")) for task in made]
    return plane_sections(results, shown, {task.section.path: task.objective.path for task in tasks})


def _protocol(config: RunConfig) -> dict[str, Any]:
    """Everything that moves the numbers and is the same for all cells."""
    return {
        "data": NAME,
        "seed": config.run.seed,
        **config.reproduce.plane.model_dump(mode="json"),
        "optimizer": "Adam, betas 0.9 and 0.999, cosine to zero over the cell's steps, weights not averaged",
        "times": "uniform on the objective's interval",
        "coupling": "independent",
        "network": "MLP, SiLU, time as a third coordinate, float32",
        "nll": f"dopri5, exact trace, batches of {LIKELIHOOD_BATCH}, error norm over the batch",
        "samples_by": "dopri5 (error norm over all samples at once); midpoint for few evaluations",
        "density_picture": f"dopri5 at {PICTURE_TOLERANCE}, exact trace",
    }


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """A cell's record as results.json shows it."""
    return {key: value for key, value in record.items() if key not in ("schema", "tensors_sha256")}


def _is_diffusion(path: Path) -> bool:
    try:
        require_diffusion_path("the score", path)
    except UserError:
        return False
    return True


class _Parts:
    """Progress over all cells: TRAINING parts of each for its training, SCORING for its scoring."""

    def __init__(self, cells: int, observe: Observer, beat: Callable[[], None]) -> None:
        self._total = cells * (TRAINING + SCORING)
        self._observe, self._beat, self._pace = observe, beat, RateMeter()
        self._cell = -1

    def start(self, label: str) -> None:
        """A cell begins."""
        self._cell += 1
        self._say(0, label)

    def found(self) -> None:
        """What is reported next took no time: the rate is that of what comes after."""
        self._pace = RateMeter()

    def trained(self, label: str, steps: int, step: int, loss: float) -> None:
        """A step was taken."""
        self._say(TRAINING * step // steps, f"{label}: step {step:,} of {steps:,}, loss {loss:.3f}")

    def scored(self, label: str, share: float, what: str) -> None:
        """A part of the scoring is finished."""
        self._say(TRAINING + int(SCORING * share), f"{label}: {what}")

    def finish(self, message: str) -> None:
        """All is done."""
        self._observe(Progress("reproduce", self._total, self._total, "parts", message))

    def _say(self, parts: int, message: str) -> None:
        self._beat()
        done = min(self._cell * (TRAINING + SCORING) + parts, self._total - 1)
        self._observe(Progress("reproduce", done, self._total, "parts", message, self._pace.rate(done)))
