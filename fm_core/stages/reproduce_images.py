"""The paper's comparison on images: each objective is a plain run, and every other command works on it."""

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fm_core.config import CellSection, RunConfig, parse_config
from fm_core.errors import Stopped, UserError
from fm_core.evaluation.comparison import by_objective, claims, curves, summary
from fm_core.evaluation.threads import cpu_threads
from fm_core.method.named import objective_named, path_named
from fm_core.method.solve import Solver
from fm_core.report.comparison_page import comparison_page
from fm_core.run.cell import Cell, alone
from fm_core.run.directory import RunDirectory
from fm_core.run.files import read_json, write_json, write_text
from fm_core.run.launch import world
from fm_core.run.progress import Observer, Progress
from fm_core.sampling.generate import Draw, generate
from fm_core.sampling.model import checkpoint_steps, load_model, weights_file
from fm_core.stages.evaluate import evaluate
from fm_core.stages.result import StageResult
from fm_core.stages.sample import sample
from fm_core.stages.shard import shard
from fm_core.stages.train import train

SHARES = {"train": 600, "curves": 200, "sample": 100, "evaluate": 80, "pictures": 20}
"""Parts of a cell's work, for the progress bar."""


@dataclass(frozen=True)
class CellRun:
    """An objective with one seed, as a run of its own."""

    section: CellSection
    seed: int
    config: RunConfig

    @property
    def title(self) -> str:
        """What tables call the objective."""
        return self.section.title or f"{self.section.objective}, {self.section.path}"


def reproduce_images(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    """Train, sample and score every cell with every seed; what is there already is verified and kept."""
    cells = cell_runs(config)
    directory = run.path / "reproduce"
    failures: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    with alone(directory) as beat:
        bar = _Bar(len(cells), observe, beat)
        shard(config)
        for cell in cells:
            try:
                records.append(_turn(cell, config, bar))
            except Stopped:
                raise
            except Exception as error:
                failures[cell.config.run.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                write_text(run.log("reproduce", cell.config.run.name), traceback.format_exc())
            bar.next_cell()
        results = {
            "kind": "images",
            "data": config.data.name,
            "summary": {name: summary(seeds) for name, seeds in by_objective(records).items()},
            "claims": claims(records, _ours(cells)),
            "curves": curves(records),
            "cells": records,
            "failed": failures,
            "config": config.model_dump(mode="json"),
        }
        changed = _write(directory, results, cells)
    paths = {"report": str(directory / "report.html"), "results": str(directory / "results.json")}
    if failures:
        listed = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise RuntimeError(
            f"{len(failures)} of {len(cells)} runs failed ({listed}); the others are in {paths['report']}; "
            "run it again to try the failed ones again"
        )
    bar.finish(paths["report"])
    return StageResult(
        stage="reproduce",
        state="done" if changed else "verified",
        seconds=0.0,
        summary=f"{len(cells)} runs compared; {paths['report']}",
        paths=paths,
        counts={
            f"frechet_distance_{record['run']}": record["scores"]["frechet_distance"]["value"]
            for record in records
        },
        hashes={record["run"]: record["scores"]["protocol"]["weights_sha256"] for record in records},
    )


def cell_runs(config: RunConfig) -> list[CellRun]:
    """The runs of the comparison, seed by seed. Raises UserError for cells that cannot be."""
    reproduce = config.reproduce
    if not reproduce.cells:
        raise UserError(
            "reproduce.cells is empty; name what to compare, as infra/configs/reproduce-digits.yaml does"
        )
    if config.train.keep_checkpoints * config.train.checkpoint_images < config.train.images:
        raise UserError(
            f"train.keep_checkpoints: {config.train.keep_checkpoints} checkpoints, one every "
            f"{config.train.checkpoint_images:,} images, do not reach over train.images = "
            f"{config.train.images:,}; the curves need them all"
        )
    cells: list[CellRun] = []
    for seed in reproduce.images.seeds:
        for section in reproduce.cells:
            try:
                path = path_named(section.path, section.path_options)
                objective_named(section.objective, path, section.objective_options)
            except UserError as error:
                raise UserError(f"reproduce.cells.{section.name}: {error}") from None
            cells.append(CellRun(section, seed, _config_of(config, section, seed)))
    return cells


def _config_of(config: RunConfig, section: CellSection, seed: int) -> RunConfig:
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
    del tree["reproduce"]
    return parse_config(tree, where=f"reproduce.cells.{section.name}")


def _ours(cells: list[CellRun]) -> str:
    """The cell that the paper's claims are about; empty if there is none."""
    asked = ("flow-matching", "optimal-transport")
    found = [c.section.name for c in cells if (c.section.objective, c.section.path) == asked]
    return found[0] if found else ""


def _turn(cell: CellRun, config: RunConfig, bar: "_Bar") -> dict[str, Any]:
    """Make one run or find it made; its record for results.json."""
    settings = config.reproduce.images
    trained = train(cell.config, bar.part("train", cell.title))
    curve = _curve(cell, settings.curve_images, bar) if settings.curve_images else []
    sample(cell.config, bar.part("sample", cell.title))
    scored = evaluate(cell.config, bar.part("evaluate", cell.title))
    scores = read_json(Path(scored.paths["scores"])) or {}
    pictures = _pictures(cell, config)
    bar.part("pictures", cell.title)(Progress("reproduce", 1, 1, "pictures"))
    return {
        "cell": cell.section.name,
        "title": cell.title,
        "run": cell.config.run.name,
        "seed": cell.seed,
        "steps": int(trained.counts["steps"]),
        "images_seen": int(trained.counts["images_seen"]),
        "fewer_steps": cell.section.steps is not None,
        "scores": scores,
        "while_training": curve,
        "pictures_sha256": pictures,
    }


def _curve(cell: CellRun, images: int, bar: "_Bar") -> list[dict[str, float]]:
    """Distance and NFE at every checkpoint."""
    steps = checkpoint_steps(cell.config)
    points: list[dict[str, float]] = []
    observe = bar.part("curves", cell.title)
    for number, step in enumerate(steps):
        config = _at(cell.config, step, images)
        scores = read_json(Path(evaluate(config).paths["scores"])) or {}
        distance = scores["frechet_distance"]
        points.append(
            {
                "images_seen": scores["images_seen"],
                "frechet_distance": distance["value"],
                "stderr": distance["stderr"],
                "nfe": scores["nfe"]["mean"],
            }
        )
        observe(Progress("reproduce", number + 1, len(steps), "checkpoints"))
    return points


def _at(config: RunConfig, step: int, images: int) -> RunConfig:
    """The run seen at one checkpoint, by few images and their distance alone."""
    tree = config.model_dump(mode="json")
    tree["sample"] |= {"step": step, "images": images}
    tree["evaluate"]["likelihood"]["images"] = 0
    tree["evaluate"]["nfe_curve"]["images"] = 0
    tree["evaluate"] |= {"metrics": ["frechet_distance"], "samples": "sampler"}
    return parse_config(tree, where=f"{config.run.name} at step {step}")


def _pictures(cell: CellRun, config: RunConfig) -> str:
    """Samples at few evaluations, uint8 [budgets, n, C, H, W], kept in the run; the SHA-256 of their file."""
    settings = config.reproduce.images
    step = checkpoint_steps(cell.config)[-1]
    model = load_model(weights_file(cell.config, step), torch.device("cpu"))
    recipe: dict[str, Any] = {
        "weights": model.weights_sha256,
        "nfe": list(settings.shown_nfe),
        "images": settings.shown_images,
        "seed": cell.config.sample.seed,
    }
    kept = _kept(cell.config)
    found = kept.read("pictures", "pictures")
    if found and found.record["recipe"] == recipe:
        return found.tensors_sha256
    with cpu_threads(world(cell.config.launch)[1]):
        drawn = [
            generate(
                model,
                Draw(Solver("midpoint", steps=nfe // 2), cell.config.sample.seed),
                0,
                settings.shown_images,
                torch.device("cpu"),
            ).images
            for nfe in settings.shown_nfe
        ]
    content = {"images": torch.stack(drawn), "levels": torch.tensor(model.quantiser.levels)}
    return kept.write("pictures", "pictures", {"recipe": recipe}, content).tensors_sha256


def _kept(config: RunConfig) -> Cell:
    return Cell(RunDirectory(config).path / "pictures")


def _write(directory: Path, results: Mapping[str, Any], cells: list[CellRun]) -> bool:
    """Write results.json and the page unless they are there already; whether they were written."""
    file, page = directory / "results.json", directory / "report.html"
    before = read_json(file)
    if (
        before
        and page.exists()
        and {**before, "schema": 0} == {**json.loads(json.dumps(results)), "schema": 0}
    ):
        return False
    made = {record["run"] for record in results["cells"]}
    drawn = {
        cell.config.run.name: _kept(cell.config).tensors("pictures")
        for cell in cells
        if cell.config.run.name in made
    }
    write_text(page, comparison_page(results, drawn))
    write_json(file, results)
    return True


class _Bar:
    """Progress over all runs, each of SHARES parts."""

    def __init__(self, runs: int, observe: Observer, beat: Callable[[], None]) -> None:
        self._observe, self._beat = observe, beat
        self._each = sum(SHARES.values())
        self._total, self._run = runs * self._each, 0

    def part(self, name: str, title: str) -> Observer:
        """The observer of one part of the present run."""
        before = sum(list(SHARES.values())[: list(SHARES).index(name)])

        def show(progress: Progress) -> None:
            self._beat()
            done = self._run * self._each + before + int(SHARES[name] * progress.fraction)
            message = f"{title}: {progress.stage} {progress.message}".rstrip()
            self._observe(Progress("reproduce", min(done, self._total - 1), self._total, "parts", message))

        return show

    def next_cell(self) -> None:
        """The next run begins."""
        self._run += 1

    def finish(self, message: str) -> None:
        """All is done."""
        self._observe(Progress("reproduce", self._total, self._total, "parts", message))
