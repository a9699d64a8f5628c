"""Sample quality of a full demo, from the scores that infra/demo.sh left in runs/digits."""

import json
from pathlib import Path

import pytest

from fm_core.config import load_config
from tests.support import ROOT

RUN = ROOT / "runs" / "digits"
SCORES = sorted(RUN.glob("evaluation/step-*/*.json"))

pytestmark = [
    pytest.mark.skipif(not SCORES, reason="no finished demo in runs/digits; bash infra/demo.sh makes one"),
]


@pytest.fixture(scope="module")
def scores() -> dict:
    config = load_config(ROOT / "infra" / "configs" / "digits.yaml")
    steps = -(-config.train.images // config.train.global_batch)
    files = sorted((RUN / "evaluation" / f"step-{steps:08d}").glob("*.json"))
    assert files, f"the demo in {RUN} is not one of the present configuration"
    return json.loads(files[-1].read_text())


def test_the_classifier_recognizes_real_validation_digits(scores: dict):
    assert scores["classifier"]["held_out_accuracy"] >= 0.97
    assert scores["recognised"]["held_out"] > 0.9


def test_samples_are_recognized_nearly_as_often_as_real_digits(scores: dict):
    known = scores["recognised"]
    assert (known["images"], known["confidence"]) == (1000, 0.9)
    assert known["value"] >= 0.9 * known["held_out"]


def test_every_class_is_there(scores: dict):
    shares = scores["recognised"]["class_shares"]
    assert len(shares) == 10
    assert min(shares) >= 0.04


def test_distances_of_samples_and_of_real_digits_are_of_equally_many_images(scores: dict):
    samples, held_out = scores["frechet_distance_of_as_many"], scores["frechet_distance_of_held_out"]
    assert samples["images"] == held_out["images"] == 500
    assert samples["features"] == held_out["features"] == "classifier"
    assert samples["value"] < held_out["value"]


def test_samples_are_not_copies(scores: dict):
    page = (RUN / "report.html").read_text()
    least = float(page.split("by root mean square difference: ")[1].split(" to ")[0])
    assert least > 0.5  # of 16 intensity levels
    assert Path(RUN / "report.html").stat().st_size > 50_000
