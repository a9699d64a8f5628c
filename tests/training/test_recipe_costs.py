"""The costs of the class-conditional recipes in training.md are those of their configurations."""

import re

import pytest

from fm_core.config import load_config
from fm_core.models.build import build_meta_network
from fm_core.models.flops import flops_per_image, parameter_count
from tests.support import ROOT

SHAPE = (3, 64, 64)
NAMES = ("imagenet64-conditional", "imagenet64-sit-b4", "imagenet64-dit-xl4")


def row_of(name):
    """The row of the table of costs: network, images, training FLOPs, days."""
    page = (ROOT / "infra" / "docs" / "training.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}\.yaml` \|(.*)\|$", page, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"[\d.,]*\d(?:e\d+)?", text)]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_costs_of_the_configuration(name):
    config = load_config(ROOT / "infra" / "configs" / f"{name}.yaml")
    network = build_meta_network(config.model, SHAPE, 1000)
    forward = flops_per_image(network, SHAPE)
    total = 3 * forward * config.train.images
    about_network, images, training, days = row_of(name)
    assert numbers(about_network)[-2:] == pytest.approx(
        [parameter_count(network) / 1e6, forward / 1e9], rel=3e-3
    )
    assert numbers(images) == pytest.approx([config.train.images / 1e6, config.train.global_batch], rel=1e-3)
    assert numbers(training) == pytest.approx([total], rel=5e-3)
    seconds = total / (8 * 0.3 * 989e12)
    assert numbers(days)[0] == pytest.approx(seconds / 86_400, abs=6e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipes_can_be_guided_and_averaged_after_training(name):
    config = load_config(ROOT / "infra" / "configs" / f"{name}.yaml")
    assert config.model.class_conditional
    assert config.train.label_dropout == 0.1
    assert config.train.ema_power_widths
    assert config.train.snapshot_images
    assert config.train.images % config.train.snapshot_images == 0 or name == NAMES[0]
