"""The paper's settings and results next to the settings and results of a comparison."""

from pathlib import Path

import pytest

from fm_core.config import load_config, merge, parse_config
from fm_core.reproduce.paper_results import deviations, training_budget

CONFIGS = Path(__file__).parents[2] / "infra" / "configs"


def rows(name, **over):
    tree = load_config(CONFIGS / f"reproduce-{name}.yaml").model_dump(mode="json")
    config = parse_config(merge(tree, over), where="x")
    return {what: (here, paper) for what, here, paper in deviations(config.model_dump(mode="json"))}


@pytest.mark.parametrize("name", ["cifar10", "imagenet32", "imagenet64"])
def test_the_shipped_comparisons_have_the_papers_budget_rate_and_precision(name):
    settings = rows(name)
    assert settings["batch x iterations"][0] == settings["batch x iterations"][1]
    here, there = (float(text.split(",")[0]) for text in settings["learning rate"])
    assert here == there
    if name != "imagenet64":
        assert settings["precision"] == ("fp32", "fp32")


def test_another_budget_and_sigma_min_are_listed():
    tree = load_config(CONFIGS / "reproduce-imagenet64.yaml").model_dump(mode="json")
    cells = [
        section | {"path_options": {"sigma_min": 0.25}} if section["path"] == "optimal-transport" else section
        for section in tree["reproduce"]["cells"]
    ]
    settings = rows("imagenet64", train={"images": 2048}, reproduce={"cells": cells})
    assert settings["batch x iterations"] == ("2,048 x 1", "2,048 x 157,000")
    assert settings["σ_min of the OT path"][0] == "0.25"
    assert rows("digits")["σ_min of the OT path"][0] == "1e-05"
    assert rows("digits")["precision"][1] == "not among its data sets"


def test_what_the_papers_networks_have_seen():
    assert training_budget("ImageNet-64") == "321,536,000 images (157,000 iterations of 2,048)"
