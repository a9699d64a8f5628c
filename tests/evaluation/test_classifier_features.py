"""Classifier stored beside a data set, and its record."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from fm_core.config import EvaluateSection
from fm_core.errors import UserError
from fm_core.evaluation.features import classifier_features
from fm_core.evaluation.features.classifier import Classifier
from fm_core.evaluation.features.classifier_features import (
    check_accuracy,
    classifier_extractor,
    first_images,
    training_steps,
)
from fm_core.evaluation.reference import Reference
from fm_core.evaluation.scores import image_scores

CPU = torch.device("cpu")


@pytest.fixture
def extractor(digits, manifest, monkeypatch):
    """Extractor with an untrained classifier, which is fast and sufficient for these tests."""
    monkeypatch.setattr(classifier_features, "RECIPE", {"classifier": "untrained", "seed": 0})
    monkeypatch.setattr(
        classifier_features, "train_classifier", lambda *_, device, on_progress: Classifier(1, 8, 10).eval()
    )
    return classifier_extractor(digits.data.root, manifest, CPU, lambda step, steps, loss: None)


def test_its_accuracy_is_recorded_with_the_number_of_images_it_was_measured_on(digits, manifest, extractor):
    """All validation images are used, even if only a few of them are scored in the same way as samples."""
    pixels, _ = first_images(digits.data.root, manifest, "val", 60)
    features, probabilities = extractor(pixels)
    part = {"features": features, "probabilities": probabilities}
    settings = EvaluateSection(metrics=("inception_score",))
    scores = image_scores([part], [part], Reference(None, None, ""), extractor, settings, CPU)
    assert scores["recognised"]["held_out_images"] == 60
    assert scores["classifier"]["held_out_images"] == 300
    assert scores["classifier"]["held_out_accuracy"] == extractor.validation_accuracy


def test_a_classifier_that_does_not_recognize_validation_images_is_refused_in_one_line(manifest, extractor):
    for least, refused in ((None, True), (0.9, True), (0.0, False)):
        if not refused:
            check_accuracy(extractor, least, manifest)
            continue
        with pytest.raises(UserError, match=r"below evaluate.classifier_min_accuracy (27.1|90.0)%") as caught:
            check_accuracy(extractor, least, manifest)
        assert "\n" not in str(caught.value)
    check_accuracy(replace(extractor, validation_accuracy=0.98), None, manifest)


def test_more_images_train_the_classifier_longer():
    assert training_steps(1_437) == training_steps(4_000) == 500
    assert training_steps(50_000) == 6_250
    assert training_steps(1_281_167) == 25_000


def test_a_record_of_an_earlier_version_without_that_number_is_read(digits, manifest, extractor):
    folder = classifier_features.Store.at(digits.data.root, manifest.name, "evaluation").local
    for path in folder.glob("classifier-*.json"):
        record = json.loads(path.read_text())
        if record["recipe"] == classifier_features.RECIPE:
            path.write_text(json.dumps({k: v for k, v in record.items() if k != "held_out_images"}))
    again = classifier_extractor(digits.data.root, manifest, CPU, lambda step, steps, loss: None)
    assert (again.sha256, again.validation_images) == (extractor.sha256, 300)


@pytest.mark.parametrize(
    ("fair", "most_images", "most_bytes", "trained_again"),
    [
        (True, 200_000, 2**32, False),
        (False, 200_000, 2**32, False),
        (True, 100, 2**32, False),
        (False, 100, 2**32, True),
        (True, 200_000, 64 * 100, True),
        (True, 100, 64 * 100, False),
    ],
)
def test_another_choice_of_training_images_is_another_classifier(
    digits, manifest, extractor, monkeypatch, fair, most_images, most_bytes, trained_again
):
    """Earlier versions took the first images by id, regardless of their order and size."""
    asked = []
    monkeypatch.setattr(classifier_features, "MAX_IMAGES", most_images)
    monkeypatch.setattr(classifier_features, "MAX_BYTES", most_bytes)
    monkeypatch.setattr(classifier_features, "has_fair_order", lambda *_: fair)
    monkeypatch.setattr(
        classifier_features, "_train", lambda *_: asked.append(1) or (b"", {"sha256": "not these"})
    )
    with suppress(UserError):
        classifier_extractor(digits.data.root, manifest, CPU, lambda step, steps, loss: None)
    folder = classifier_features.Store.at(digits.data.root, manifest.name, "evaluation").local
    for path in folder.glob("classifier-*.safetensors"):
        if not path.read_bytes():
            path.unlink()
            path.with_suffix(".json").unlink()
    assert bool(asked) == trained_again
