"""Which checkpoints online evaluation scores, and with which settings; starts no process."""

import io
import sys
from pathlib import Path

import pytest

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.launch.online_eval import read_online_scores
from fm_core.run.directory import RunDirectory
from fm_core.run.results import StageResult
from fm_core.stages import score_checkpoints
from fm_core.stages.train import train
from fm_core.storage.atomic_files import append_line, read_json, write_json


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run whose checkpoints are marks alone and whose scores are what `distances` says of them."""
    tree = {
        "run": {"root": str(tmp_path), "name": "r"},
        "evaluate": {"online": {"images": 16, "solver": "euler", "steps": 2}},
    }
    config = RunConfig.model_validate(tree)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(score_checkpoints.select, "select", lambda *facts: ([sys.stdin], [], []))
    monkeypatch.setattr(score_checkpoints, "sample", lambda config: None)
    return config


def checkpoint(config, step, content="first"):
    folder = Path(RunDirectory(config).checkpoints) / f"step-{step:08d}"
    write_json(folder / "COMPLETE", {"files": {"raw.safetensors": content}})
    write_json(folder / "state.json", {})
    (folder / "raw.safetensors").write_text(content)


def scoring(monkeypatch, config, distances):
    def evaluate(config):
        step = config.sample.step
        if distances[step] is None:
            raise UserError("the feature extractor is missing")
        path = Path(config.run.root) / "scores.json"
        distance = {"value": distances[step], "stderr": 0.1, "images": 16, "features": "f"}
        write_json(path, {"images_seen": step, "frechet_distance": distance, "nfe": {"mean": 2}})
        return StageResult(stage="evaluate", state="done", seconds=0, summary="", paths={"scores": str(path)})

    monkeypatch.setattr(score_checkpoints, "evaluate", evaluate)
    score_checkpoints.score_checkpoints(config)
    return [
        (line["step"], line["frechet_distance"]) for line in read_online_scores(RunDirectory(config).path)
    ]


def test_a_checkpoint_that_cannot_be_scored_is_reported_and_the_next_is_scored(config, monkeypatch, caplog):
    checkpoint(config, 10)
    assert scoring(monkeypatch, config, {10: None}) == []
    assert caplog.messages == [
        "the checkpoint of step 10 could not be scored: the feature extractor is missing"
    ]
    checkpoint(config, 20)
    assert scoring(monkeypatch, config, {20: 3.0}) == [(20, 3.0)]


def test_steps_that_were_trained_again_are_scored_again(config, monkeypatch):
    for step, distance in ((10, 5.0), (20, 4.0), (30, 3.0)):
        checkpoint(config, step)
        scoring(monkeypatch, config, {step: distance})
    # Training went back behind step 20 and comes by it again.
    for step in (20, 30):
        folder = Path(RunDirectory(config).checkpoints) / f"step-{step:08d}"
        score_checkpoints.shutil.rmtree(folder)
    checkpoint(config, 20, "again")
    assert scoring(monkeypatch, config, {20: 4.5}) == [(10, 5.0), (20, 4.5)]
    assert scoring(monkeypatch, config, {}) == [(10, 5.0), (20, 4.5)]
    # The retained best checkpoint is still there; the score of its own step replaces it.
    assert read_json(RunDirectory(config).path / "best.json")["step"] == 30
    checkpoint(config, 30, "again")
    scoring(monkeypatch, config, {30: 6.0})
    best = read_json(RunDirectory(config).path / "best.json")
    assert (best["step"], best["frechet_distance"]) == (30, 6.0)
    assert (Path(best["checkpoint"]) / "raw.safetensors").read_text() == "again"


def test_lines_of_a_version_that_did_not_name_the_checkpoint_stay(config, monkeypatch):
    checkpoint(config, 10)
    file = RunDirectory(config).path / "evaluation" / "beside.jsonl"
    append_line(file, {"step": 10, "frechet_distance": 1.0})
    assert scoring(monkeypatch, config, {}) == [(10, 1.0)]


def test_only_the_distance_of_the_checkpoint_s_own_samples_is_made(config):
    asked = {
        "nfe_curve": {"images": 8},
        "samples": "sampler",
        "reference_out": "x.npz",
        "output": "x.json",
        "likelihood": {"images": 8},
        "online": {"images": 16},
    }
    over = {"evaluate": asked, "sample": {"weights": "other.safetensors", "trajectories": 9}}
    trained = RunConfig.model_validate({**config.model_dump(), **over})
    elsewhere = score_checkpoints._scoring_config(trained, 10)
    evaluate = elsewhere.evaluate
    assert (evaluate.nfe_curve.images, evaluate.likelihood.images, evaluate.online.images) == (0, 0, 0)
    assert (evaluate.samples, evaluate.reference_out, evaluate.output) == (None, None, None)
    assert evaluate.metrics == ("frechet_distance",)
    assert (elsewhere.sample.weights, elsewhere.sample.trajectories) == ("ema", 0)


def test_training_alone_refuses_scores_that_could_not_be_made(config):
    tree = {**config.model_dump(), "train": {"checkpoint_root": "s3://bucket/run"}}
    with pytest.raises(UserError, match=r"evaluate.online: train.checkpoint_root must be a directory"):
        train(RunConfig.model_validate(tree))
