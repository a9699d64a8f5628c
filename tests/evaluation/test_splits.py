"""Errors for data sets that lack a required split, raised before anything is scored."""

import pytest
import torch

from fm_core.config import EvaluateSection
from fm_core.errors import UserError
from fm_core.evaluation import evaluation_run
from fm_core.evaluation.evaluation_run import EvaluationRun, check_splits


def without(manifest, split):
    splits = {name: facts for name, facts in manifest.splits.items() if name != split}
    return manifest.model_copy(update={"splits": splits})


def test_an_evaluation_without_validation_images_is_refused_in_one_line(digits, manifest, monkeypatch):
    monkeypatch.setattr(evaluation_run, "load_manifest", lambda root, name: without(manifest, "val"))
    with pytest.raises(
        UserError, match=r"data.name digits has no split val, only train: real validation"
    ) as caught:
        EvaluationRun(digits, torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"reference": "train"}, "no split train, only val: it is evaluate.reference"),
        ({"reference": "val", "features": "classifier"}, "the classifier is trained on it"),
    ],
)
def test_a_missing_split_is_refused_if_it_is_needed(manifest, keys, reason):
    settings = EvaluateSection.model_validate({"features": "inception", **keys})
    with pytest.raises(UserError, match=reason):
        check_splits(settings, without(manifest, "train"))


def test_external_statistics_need_no_training_images(manifest):
    settings = EvaluateSection.model_validate({"features": "inception", "reference": "statistics.npz"})
    check_splits(settings, without(manifest, "train"))


def test_a_hash_of_weights_that_the_classifier_does_not_take_is_refused():
    settings = EvaluateSection.model_validate({"weights_sha256": "0" * 64})
    with pytest.raises(
        UserError, match=r"evaluate.weights_sha256: the classifier is trained on the data set"
    ):
        evaluation_run.check_extractors(settings)
