"""The export stage: weights, configuration, scores and model card of a model in one folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from fm_core.config import RunConfig, dump_yaml
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.report.model_card import CardFacts, hub_card, model_card
from fm_core.report.score_table import ScoreEntry
from fm_core.run.directory import RunDirectory, step_name
from fm_core.run.progress import Observer, Progress, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.sampling.api import EXPORTED
from fm_core.sampling.checkpoint_source import Model, checkpoint_step, load_model, weights_file
from fm_core.sampling.model_hub import (
    CARD,
    CONFIG,
    SCORES,
    SUMS,
    check_hub,
    push_export,
    sums_of,
)
from fm_core.sampling.sample_protocol import weights_name
from fm_core.stages.resolve import resolve
from fm_core.storage.atomic_files import read_json, write_json, write_text
from fm_core.storage.hashing import sha256_file

_PRIVATE: dict[str, Any] = {
    "launch": True,
    "reproduce": True,
    "report": True,
    "sweep": True,
    "run": {"root"},
    "data": {"root": True, "cache": True, "label_map": True, "source": {"url"}, "pairs": True},
    "train": {
        *("checkpoint_root", "checkpoint_staging", "init_from", "init_source", "init_attention_order"),
        *("prometheus", "wandb"),
    },
    "sample": {"root": True, "weights": True, "guide": {"run"}},
    "evaluate": {"weights", "extractors", "samples", "reference", "reference_out", "output"},
    "export": True,
}
"""Keys that are not published: places of this machine, and sections that do not concern the model."""


def export(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Write weights, configuration, scores and model card, or verify an existing export.

    Raises:
        UserError: the weights are missing or damaged, or the folder contains another model.
    """
    config = resolve(config)
    return run_stage_function("export", config, observe, lambda run, show: _export(config, run, show))


def _export(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    if config.export.push:
        check_hub()
    step = checkpoint_step(config)
    file = weights_file(config, step)
    model = load_model(file, torch.device("cpu"), config)
    run.begin()
    folder = Path(config.export.folder or run.path / "export" / f"{step_name(step)}-{weights_name(config)}")
    target, scores = folder / EXPORTED, _scores(run, model)
    written = not target.exists()
    if written:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{EXPORTED}.partial"
        shutil.copyfile(file, partial)
        partial.replace(target)
    if sha256_file(target) != model.weights_sha256:
        raise UserError(f"export.folder: {target} contains another model; set another folder")
    written |= _describe(config, model, scores, folder)
    paths, hub = {"folder": str(folder)}, config.export.hub
    if hub and config.export.push:
        observe(Progress("export", 0, 1, "folder", f"uploading to hf://{hub}"))
        paths["commit"] = push_export(folder, hub, config.export.private, f"fm export of step {step:,}")
    unlicensed = "; its card states no license (export.license)" if hub and not config.export.license else ""
    observe(Progress("export", 1, 1, "folder", str(folder)))
    return StageResult(
        stage="export",
        state="done" if written else "verified",
        seconds=0.0,
        summary=f"step {step:,} with {len(scores)} sets of scores{unlicensed}",
        paths=paths,
        hashes={"weights": model.weights_sha256},
    )


def _describe(config: RunConfig, model: Model, scores: list[ScoreEntry], folder: Path) -> bool:
    """Write card, configuration and scores, and the hashes of an export for the hub; whether any changed."""
    hub, tree = config.export.hub, _public_tree(config)
    train = tree["train"] if hub else config.train.model_dump(mode="json")
    facts = CardFacts(
        config.run.name, model.recipe, train, _data_recipe(config, model), scores, model.objective.two_times
    )
    if hub:
        files = {
            CARD: hub_card(facts, hub, config.export.license),
            CONFIG: yaml.safe_dump(tree, sort_keys=False),
        }
    else:
        files = {CARD: model_card(facts), CONFIG: dump_yaml(config)}
    written = [_write_changed(folder / name, text) for name, text in files.items()]
    record = {"scores": [{"name": entry.name, **entry.scores} for entry in scores]}
    if (read_json(folder / SCORES) or {}).get("scores") != json.loads(json.dumps(record["scores"])):
        written.append(True)
        write_json(folder / SCORES, record)
    if hub:
        written.append(_write_changed(folder / SUMS, sums_of(folder)))
    return any(written)


def _public_tree(config: RunConfig) -> dict[str, Any]:
    """The configuration without places of this machine; names of files remain where a key is required."""
    tree = config.model_dump(mode="json", exclude=_PRIVATE)
    tree["evaluate"]["features"] = tree["evaluate"]["features"].rpartition("/")[2]
    if config.data.pairs.samples:
        tree["data"]["pairs"] = {"samples": "pairs"}
    return tree


def _write_changed(path: Path, text: str) -> bool:
    """Write a text file unless it has this content; return whether it was written."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def _scores(run: RunDirectory, model: Model) -> list[ScoreEntry]:
    """Every evaluation of exactly these weights."""
    records = [(path, read_json(path)) for path in sorted(run.path.glob("evaluation/*/*.json"))]
    return [
        ScoreEntry(path.stem, record)
        for path, record in records
        if record and record["protocol"].get("weights_sha256") == model.weights_sha256
    ]


def _data_recipe(config: RunConfig, model: Model) -> dict[str, Any] | None:
    """How the pixels were produced, if the data set that the model was trained on is available."""
    try:
        manifest = load_manifest(config.data.root, config.data.name)
    except UserError:
        return None
    return dict(manifest.recipe) if manifest.version == model.data_version else None
