"""Several extractors in one evaluation: the scores of separate ones, from images that are read once."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fm_core.config import merge, parse_config
from fm_core.data.reader import ImageReader
from fm_core.errors import UserError
from fm_core.evaluation import evaluation_run, image_sources, reference
from fm_core.evaluation.evaluation_run import EvaluationRun
from fm_core.evaluation.evaluation_worker import evaluate as evaluate_rank
from fm_core.evaluation.reference_statistics import write_statistics
from fm_core.launch.worker_main import Rank
from fm_core.stages.evaluate import evaluate
from fm_core.stages.score_checkpoints import _scoring_config
from fm_core.storage.atomic_files import read_json

CPU = torch.device("cpu")


class Pooled(nn.Module):
    """Twelve features and three logits of images of 3 x 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = nn.Linear(12, 3)

    def forward(self, images):
        features = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features, self.read(features)


class Projected(nn.Module):
    """Ten features of images of 3 x 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.read = nn.Linear(192, 10)

    def forward(self, images):
        return self.read(images.float().flatten(1) / 255)


class Averages(nn.Module):
    """Means of the four quarters of each image as features, and two logits."""

    def forward(self, images):
        quarters = nn.functional.adaptive_avg_pool2d(images[:, :1].float() / 255, 2).flatten(1)
        return quarters, quarters[:, :2]


POOLED, PROJECTED, AVERAGES = (f"{__name__}:{name}" for name in ("Pooled", "Projected", "Averages"))
METRICS = ("frechet_distance", "kernel_distance", "inception_score", "precision_recall")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "images.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 17, (400, 8, 8, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripted") / "projected.pt"
    torch.jit.script(Projected()).save(path)
    return str(path)


@pytest.fixture
def configured(digits, images, tmp_path):
    """Function that returns a configuration of an evaluation; each `place` has an empty store of its own."""

    def configure(place, **keys):
        root = tmp_path / place
        if not (root / "data").exists():
            ignored = shutil.ignore_patterns("evaluation")
            shutil.copytree(Path(digits.data.root), root / "data", ignore=ignored)
        over = {
            "run": {"root": str(root / "runs")},
            "data": {"root": str(root / "data")},
            "evaluate": {"samples": str(images), "processes": 1, **keys},
        }
        return parse_config(merge(digits.model_dump(mode="json"), over), where="test")

    return configure


def scores_of(config):
    return read_json(Path(evaluate(config).paths["scores"]))


def reference_parts(config):
    return list(Path(config.data.root).rglob("moments-*"))


@pytest.fixture
def read_counts(monkeypatch):
    """How often each image was read, by source and number."""
    counts = Counter()
    read = ImageReader.read

    def counted(self, ids):
        counts.update((self.split, int(number)) for number in ids)
        return read(self, ids)

    monkeypatch.setattr(ImageReader, "read", counted)
    return counts


def assert_same(theirs, alone):
    """The records of a further extractor and those of an evaluation with it alone."""
    names = theirs.keys() - {"protocol"}
    assert {"frechet_distance", "frechet_distance_of_held_out", "frechet_distance_ratio"} <= names
    assert {"kernel_distance", "precision", "recall"} <= names
    assert names == alone.keys() - {"protocol", "schema", "seconds", "duplicates"}
    assert {name: theirs[name] for name in names} == {name: alone[name] for name in names}
    shared = ("reference", "features", "features_sha256", "pair_images")
    assert {key: theirs["protocol"][key] for key in shared} == {key: alone["protocol"][key] for key in shared}


def test_scores_equal_those_of_separate_evaluations_and_each_image_is_read_once(
    configured, scripted, read_counts, manifest
):
    further = [{"features": scripted}, {"features": AVERAGES}]
    keys = {"features": POOLED, "metrics": METRICS, "pair_images": 300}
    together = scores_of(configured("together", **keys, extractors=further))
    real = {("val", number): 1 for number in range(300)}
    assert read_counts == {("train", number): 1 for number in range(manifest.splits["train"].images)} | real
    alone = [
        scores_of(configured("alone", **{**keys, "features": features}))
        for features in (POOLED, scripted, AVERAGES)
    ]
    assert list(together["extractors"]) == ["torchscript-projected", AVERAGES]
    assert "classifier_score" in together["extractors"][AVERAGES]
    for theirs, own in zip(together["extractors"].values(), alone[1:], strict=True):
        assert_same(theirs, own)
    own_keys = alone[0].keys() - {"seconds"}
    assert together.keys() - {"seconds", "extractors"} == own_keys
    assert {key: together[key] for key in own_keys} == {key: alone[0][key] for key in own_keys}


def test_samples_are_read_once_for_all_extractors(configured, scripted, monkeypatch):
    counts = Counter()
    open_source = evaluation_run.external_images

    def opened(*arguments):
        source = open_source(*arguments)
        read = source.read

        def counted(number):
            counts[number] += 1
            return read(number)

        object.__setattr__(source, "read", counted)
        return source

    monkeypatch.setattr(evaluation_run, "external_images", opened)
    monkeypatch.setattr(image_sources, "PART_IMAGES", 100)
    metrics = ["frechet_distance", "kernel_distance"]
    keys = {"features": POOLED, "metrics": metrics, "extractors": [{"features": scripted}]}
    assert "extractors" in scores_of(configured("counted", **keys))
    assert counts == dict.fromkeys(range(4), 1)


def test_parts_of_two_ranks_and_an_interrupted_one_give_the_same_scores(
    configured, scripted, monkeypatch, tmp_path
):
    for module, name in (
        (reference, "PART_IMAGES"),
        (evaluation_run, "VALIDATION_PART_IMAGES"),
        (image_sources, "PART_IMAGES"),
    ):
        monkeypatch.setattr(module, name, 256)
    keys = {"features": POOLED, "metrics": ["frechet_distance"], "extractors": [{"features": scripted}]}
    alone = scores_of(configured("one", **keys))
    config = configured("two", **keys)
    control = tmp_path / "control"
    control.mkdir()
    evaluation = EvaluationRun(config, CPU)
    evaluation.open(lambda step, steps, loss: None)
    first = next(iter(evaluation.tasks.values()))
    assert len(first.ranges) == 6
    first.run(4)  # an interrupted evaluation made one part of the reference
    (part,) = reference_parts(config)
    before = part.stat().st_mtime_ns
    for number in (1, 0):
        evaluate_rank(config, Rank(number, 2, number, control, "job"))
    assert part.stat().st_mtime_ns == before
    together = scores_of(config)
    assert {**together, "seconds": 0} == {**alone, "seconds": 0}
    assert not reference_parts(config)


def test_the_statistics_of_one_extractor_are_reused_and_the_missing_ones_computed(configured, scripted):
    place = "reused"
    only = {"metrics": ["frechet_distance"], "features": POOLED}
    alone = scores_of(configured(place, **only))
    again = scores_of(configured(place, **only, extractors=[{"features": scripted}]))
    assert again["frechet_distance"] == alone["frechet_distance"]
    assert list(again["extractors"]) == ["torchscript-projected"]


def test_without_further_extractors_the_key_of_the_scores_is_unchanged(configured, scripted):
    keys = [
        EvaluationRun(configured("key", features=POOLED, **over), CPU).key
        for over in ({}, {"extractors": []}, {"extractors": [{"features": scripted}]})
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_further_extractor_has_statistics_of_its_own(configured, scripted, tmp_path):
    config = configured("statistics", features=scripted, metrics=["frechet_distance", "kernel_distance"])
    evaluation = EvaluationRun(config, CPU)
    evaluation.open(lambda step, steps, loss: None)
    for task in evaluation.tasks.values():
        for number in task.missing():
            task.run(number)
    file = tmp_path / "statistics.npz"
    write_statistics(file, evaluation.reference.gaussian, evaluation.extractor, evaluation.manifest)
    keys = {"features": POOLED, "metrics": config.evaluate.metrics}
    further = [{"features": scripted, "reference": str(file)}]
    own = scores_of(configured("statistics", **keys, extractors=further))["extractors"]
    alone = scores_of(config)
    value = alone["frechet_distance"]["value"]
    assert own["torchscript-projected"]["frechet_distance"]["value"] == pytest.approx(value, rel=1e-9)
    # The file has no images for metrics over pairs.
    assert "kernel_distance" not in own["torchscript-projected"]
    swapped = configured("statistics", **keys, reference=str(file), extractors=[{"features": scripted}])
    with pytest.raises(UserError, match=r"evaluate\.extractors\.0\.reference: .* holds statistics"):
        evaluate(swapped)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"features": "dinov2"}, "evaluate.extractors.0.features dinov2 needs evaluate.extractors.0.weights"),
        ({"features": "inception"}, "evaluate.extractors.0.features inception needs evaluate.extractors.0.w"),
        (
            {"features": PROJECTED, "weights": "none.pt"},
            "evaluate.extractors.0.weights: none.pt does not exi",
        ),
        ({"features": "none.pt"}, "evaluate.extractors.0.features: none.pt does not exist"),
        ({"features": "classifier", "weights": "x"}, "evaluate.extractors.0.weights: the classifier is trai"),
        ({"features": "clip"}, "evaluate.extractors.0.features clip: allowed are classifier"),
        ({"features": POOLED}, f"evaluate.extractors.0.features: {POOLED} is named twice"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_before_images_are_read(
    configured, read_counts, further, message
):
    with pytest.raises(UserError) as caught:
        evaluate(configured("refused", features=POOLED, extractors=[further]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not read_counts


def test_two_extractors_with_one_name_are_refused(configured, scripted, tmp_path, read_counts):
    other = tmp_path / "projected.pt"
    torch.jit.script(Projected()).save(other)
    with pytest.raises(UserError, match=r"evaluate\.extractors\.0\.features: projected.pt is named twice"):
        configured("named", features=scripted, extractors=[{"features": str(other)}])
    inception = {"features": "inception", "weights": str(other)}
    with pytest.raises(UserError, match=rf"inception with weights {other} is named twice"):
        configured("named", features=scripted, extractors=[inception, inception])
    assert not read_counts


def test_online_evaluation_has_one_extractor(configured, scripted):
    further = [{"features": scripted}]
    config = configured("online", features=POOLED, extractors=further, online={"images": 10})
    assert _scoring_config(config, 5).evaluate.extractors == ()
