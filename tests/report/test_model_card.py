"""Model cards: metadata of the hub, scores with their errors and protocols, memorization."""

import re

import pytest
import yaml

from fm_core.report.model_card import CardFacts, hub_card, model_card
from fm_core.report.score_table import ScoreEntry
from tests.support.model_hub_server import metadata_errors

RECIPE = {
    "image_shape": [3, 64, 64],
    "levels": 256,
    "classes": 1000,
    "model": {"kind": "transformer", "class_conditional": True},
    "method": {"objective": "flow-matching", "path": "optimal-transport", "coupling": "independent"},
    "data": {"name": "imagenet64", "version": "v1"},
    "images_seen": 1000,
    "step": 10,
    "seed": 0,
}
DISTANCE = {"value": 2.5, "stderr": 0.125, "images": 50_000, "features": "inception-v3-2015-12-05"}
NEARER = {"value": 0.75, "stderr": 0.02, "expected": 0.5}
MEMORIZATION = {
    "pixels": {
        "distance": "root mean square difference",
        "samples": {"value": 1.5, "stderr": 0.1},
        "held_out": {"value": 2.5, "stderr": 0.1},
        "nearer": NEARER,
        "near_copies": {"value": 0.25, "stderr": 0.01, "expected": 0.01},
        "images": 1000,
        "training_images": 50_000,
    }
}
SCORES = {
    "protocol": {"solver": "ab2", "features": "inception"},
    "frechet_distance": DISTANCE,
    "precision": {**DISTANCE, "value": 0.75, "unreliable": "too few"},
    "memorization": MEMORIZATION,
}


def facts(*scores):
    entries = [ScoreEntry(f"set-{number}", each) for number, each in enumerate(scores)]
    return CardFacts('a: name with "signs" #', RECIPE, {"learning_rate": 1e-4}, None, entries)


def metadata_of(card):
    text = re.match(r"---\n(.*?)\n---\n\n# ", card, re.DOTALL)
    return yaml.safe_load(text[1])


def test_the_metadata_has_each_score_with_its_error_and_no_license_of_ours():
    card = hub_card(facts(SCORES), "someone/model", None)
    metadata = metadata_of(card)
    assert metadata_errors(card) == []
    assert "license" not in metadata
    (model,) = metadata["model-index"]
    assert model["name"] == 'a: name with "signs" #'
    (result,) = model["results"]
    assert result["dataset"] == {"name": "imagenet64", "type": "imagenet64", "revision": "v1"}
    assert result["metrics"] == [
        {"type": "fid", "name": "FID, 50,000 images, standard error 0.125", "value": 2.5},
        {
            "type": "precision",
            "name": "precision, 50,000 images, standard error 0.125 (unreliable)",
            "value": 0.75,
        },
    ]
    assert metadata_of(hub_card(facts(SCORES), "someone/model", "mit"))["license"] == "mit"


def test_distances_on_other_features_are_not_called_fid():
    scores = {**SCORES, "frechet_distance": {**DISTANCE, "features": "classifier"}}
    (first, *_) = metadata_of(hub_card(facts(scores), "a/b", None))["model-index"][0]["results"][0]["metrics"]
    assert first["type"] == "frechet-distance"
    assert "fid" not in first["name"].lower()


def test_without_scores_the_metadata_has_no_results():
    card = hub_card(facts(), "someone/model", None)
    assert "model-index" not in metadata_of(card)
    assert metadata_errors(card) == []
    assert "No scores were computed." in card


def test_scores_protocols_and_memorization_are_in_the_text():
    card = model_card(facts(SCORES, {**SCORES, "protocol": {"solver": "dopri5"}}))
    for text in (
        "| set-0 | A | 2.500 ± 0.125 (50,000) |",
        "- solver: A: ab2; B: dopri5",
        "Memorization in set-1:",
        "| root mean square difference | 1.500 ± 0.100 | 2.500 ± 0.100 |",
        "This model overfits: its samples are nearer",
        '"solver": "dopri5"',
        'fm_core.load("this/folder")',
    ):
        assert text in card
    unscored = {key: value for key, value in SCORES.items() if key != "memorization"}
    assert "Memorization" not in model_card(facts(unscored))


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ("# a card", "no metadata"),
        ("---\na: [\n---\n", "while parsing"),
        (
            "---\nmodel-index: [{results: [{task: {type: x}, metrics: [{type: fid, value: high}]}]}]\n---\n",
            "a metric needs a type and a number",
        ),
    ],
)
def test_the_fake_hub_refuses_invalid_metadata(card, problem):
    assert problem in metadata_errors(card)[0]
