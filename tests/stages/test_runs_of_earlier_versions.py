"""A run that an earlier version started is resumed, sampled, scored and reported.

tests/support/fixtures/run-of-0522e96.tar.gz holds what commit 0522e96 left when `fm train` was killed after
step 8 of 20: shards, the checkpoint, samples and scores of it; and the metrics of the same run undisturbed.
"""

import json
import subprocess
from pathlib import Path

import pytest

import fm_core
from fm_core.config import RunConfig, load_config
from fm_core.stages.evaluate import evaluate
from fm_core.stages.report import report
from fm_core.stages.sample import sample
from fm_core.stages.shard import shard
from fm_core.stages.train import train
from fm_core.stages.validate import validate

ARCHIVE = Path(__file__).parents[1] / "support" / "fixtures" / "run-of-0522e96.tar.gz"
STEP = 8


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    # extractall() has its argument filter since Python 3.11.4, and warns without it in later versions.
    subprocess.run(["tar", "-xzf", ARCHIVE, "-C", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def old_config(**sample_keys) -> RunConfig:
    """Its configuration, with the ranks in this process."""
    launch = {"kind": "debug", "processes": 1}
    return load_config("old.yaml", {"sample": sample_keys, "launch": launch})


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_trained_to_its_end_as_if_nothing_had_happened(folder):
    result = train(old_config())
    assert result.state == "done"
    assert result.counts["steps"] == 20
    metrics = lines_of(folder / "runs" / "old" / "train" / "metrics.jsonl")
    expected = lines_of(folder / "expected-metrics.jsonl")
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, reference in zip(metrics, expected, strict=True):
        for key in ("images_seen", "position", "skipped_steps", "rollbacks"):
            assert line[key] == reference[key]
        # Another processor sums in another order.
        for key in ("loss", "lr", "grad_norm"):
            assert line[key] == pytest.approx(reference[key], rel=1e-4)
    assert train(old_config()).state == "verified"
    model = fm_core.load(folder / "runs" / "old").model
    assert (model.step, model.generator) == (20, "numpy-v1")
    assert "generator" not in model.recipe
    assert load_config(folder / "runs" / "old" / "config.yaml").run.generator == "numpy-v1"


def test_its_shards_samples_and_scores_are_verified(folder):
    assert shard(old_config()).state == "verified"
    assert validate(old_config(), depth="deep").counts["images"] == 1797
    assert sample(old_config(step=STEP)).state == "verified"
    assert evaluate(old_config(step=STEP)).state == "verified"
    assert fm_core.load(folder / "runs" / "old", step=STEP).sample(4, solver="euler", steps=2).shape[0] == 4


def test_a_missing_batch_of_its_samples_is_made_again_with_the_same_pixels(folder):
    (tar,) = folder.glob("runs/old/samples/step-*/ema-*/samples-000001.tar")
    before = tar.read_bytes()
    tar.unlink()
    assert sample(old_config(step=STEP)).state == "done"
    # The same member names and sizes, and pixels equal but for rounding on another processor.
    assert len(tar.read_bytes()) == len(before)
    differing = sum(a != b for a, b in zip(tar.read_bytes(), before, strict=True))
    assert differing < len(before) // 50


def test_it_is_reported(folder):
    assert report(old_config(step=STEP)).state == "done"
    page = (folder / "runs" / "old" / "report.html").read_text()
    assert "561.34" in page  # the Fréchet distance that was measured then
