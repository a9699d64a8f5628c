"""What the page says of the paper's settings beside ours."""

from pathlib import Path

import pytest

from fm_core.config import load_config, merge, parse_config
from fm_core.reproduce.paper_results import deviations, training_budget

CONFIGS = Path(__file__).parents[2] / "infra" / "configs"


def rows(name, **over):
    tree = load_config(CONFIGS / f"reproduce-{name}.yaml").model_dump(mode="json")
    config = parse_config(merge(tree, over), where="x")
    return {what: (here, there) for what, here, there in deviations(config.model_dump(mode="json"))}


@pytest.mark.parametrize("name", ["cifar10", "imagenet32", "imagenet64"])
def test_the_shipped_comparisons_have_the_papers_budget_rate_and_precision(name):
    told = rows(name)
    assert told["batch x iterations"][0] == told["batch x iterations"][1]
    here, there = (float(text.split(",")[0]) for text in told["learning rate"])
    assert here == there
    if name != "imagenet64":
        assert told["precision"] == ("fp32", "fp32")


def test_another_budget_and_sigma_min_are_told():
    tree = load_config(CONFIGS / "reproduce-imagenet64.yaml").model_dump(mode="json")
    cells = [
        cell | {"path_options": {"sigma_min": 0.25}} if cell["path"] == "optimal-transport" else cell
        for cell in tree["reproduce"]["cells"]
    ]
    told = rows("imagenet64", train={"images": 2048}, reproduce={"cells": cells})
    assert told["batch x iterations"] == ("2,048 x 1", "2,048 x 157,000")
    assert told["σ_min of the OT path"][0] == "0.25"
    assert rows("digits")["σ_min of the OT path"][0] == "1e-05"
    assert rows("digits")["precision"][1] == "not among its data sets"


def test_what_the_papers_networks_have_seen():
    assert training_budget("ImageNet-64") == "321,536,000 images (157,000 iterations of 2,048)"
