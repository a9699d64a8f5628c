"""The export stage: weights, configuration, scores and model card of a model in one folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fm_core.config import RunConfig, dump_yaml
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.report.model_card import model_card
from fm_core.report.score_table import ScoreEntry
from fm_core.run.directory import RunDirectory, step_name
from fm_core.run.progress import Observer, Progress, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.sampling.api import EXPORTED
from fm_core.sampling.checkpoint_source import Model, checkpoint_step, load_model, weights_file
from fm_core.sampling.sample_protocol import weights_name
from fm_core.stages.resolve import resolve
from fm_core.storage.atomic_files import read_json, write_json, write_text
from fm_core.storage.hashing import sha256_file


def export(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Write weights, configuration, scores and model card, or verify an existing export.

    Raises:
        UserError: the weights are missing or damaged, or the folder contains another model.
    """
    config = resolve(config)
    return run_stage_function("export", config, observe, lambda run, show: _export(config, run, show))


def _export(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    step = checkpoint_step(config)
    file = weights_file(config, step)
    model = load_model(file, torch.device("cpu"), config)
    run.begin()
    folder = Path(config.export.folder or run.path / "export" / f"{step_name(step)}-{weights_name(config)}")
    target, scores = folder / EXPORTED, _scores(run, model)
    state = "verified"
    if not target.exists():
        state = "done"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{EXPORTED}.partial"
        shutil.copyfile(file, partial)
        partial.replace(target)
    if sha256_file(target) != model.weights_sha256:
        raise UserError(f"export.folder: {target} contains another model; set another folder")
    card = model_card(
        config.run.name,
        model.recipe,
        _train(config),
        _data_recipe(config, model),
        scores,
        model.objective.two_times,
    )
    files = {"README.md": card, "config.yaml": dump_yaml(config)}
    for name, text in files.items():
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text:
            state = "done"
            write_text(folder / name, text)
    record = {"scores": [{"name": entry.name, **entry.scores} for entry in scores]}
    if (read_json(folder / "scores.json") or {}).get("scores") != json.loads(json.dumps(record["scores"])):
        state = "done"
        write_json(folder / "scores.json", record)
    observe(Progress("export", 1, 1, "folder", str(folder)))
    return StageResult(
        stage="export",
        state=state,
        seconds=0.0,
        summary=f"step {step:,} with {len(scores)} sets of scores",
        paths={"folder": str(folder)},
        hashes={"weights": model.weights_sha256},
    )


def _scores(run: RunDirectory, model: Model) -> list[ScoreEntry]:
    """Every evaluation of exactly these weights."""
    records = [(path, read_json(path)) for path in sorted(run.path.glob("evaluation/*/*.json"))]
    return [
        ScoreEntry(path.stem, record)
        for path, record in records
        if record and record["protocol"].get("weights_sha256") == model.weights_sha256
    ]


def _train(config: RunConfig) -> dict[str, Any]:
    return config.train.model_dump(mode="json")


def _data_recipe(config: RunConfig, model: Model) -> dict[str, Any] | None:
    """How the pixels were produced, if the data set that the model was trained on is available."""
    try:
        manifest = load_manifest(config.data.root, config.data.name)
    except UserError:
        return None
    return dict(manifest.recipe) if manifest.version == model.data_version else None
