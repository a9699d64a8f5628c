"""Defaults derived from the resolution and the number of images."""

from pathlib import Path

import pytest

from fm_core.config import ModelSection, RunConfig, config_class, load_config
from fm_core.config.derived_defaults import (
    DatasetSize,
    absent_keys,
    dataset_name,
    validation_images_for,
    with_derived,
    with_values_of,
)
from fm_core.models.build import build_meta_network

CONFIGS = Path(__file__).parents[2] / "infra" / "configs"
DIGITS = DatasetSize(side=8, images=1297)


def derived(size: DatasetSize, **sections) -> RunConfig:
    return with_derived(RunConfig.model_validate(sections), size)


def test_the_derived_values_of_the_digits_are_the_defaults_of_the_sections():
    assert derived(DIGITS).model_dump() == RunConfig().model_dump()


@pytest.mark.parametrize("kind", ["unet", "transformer"])
@pytest.mark.parametrize("side", [4, 8, 12, 28, 32, 33, 50, 64, 96, 100, 128, 256])
@pytest.mark.parametrize("images", [1, 7_349, 1_281_167])
def test_a_network_can_be_built_for_every_resolution(kind, side, images):
    config = derived(DatasetSize(side, images), model={"kind": kind})
    build_meta_network(config.model, (3, side, side), 10)
    assert absent_keys(config) == {}
    assert config.train.checkpoint_images <= config.train.images


def test_more_and_larger_images_get_a_larger_network_and_a_longer_training():
    small, large, many = (derived(DatasetSize(s, n)) for s, n in ((16, 5_000), (64, 5_000), (64, 100_000)))
    assert small.train.images < large.train.images < many.train.images
    assert large.model.channels < many.model.channels
    assert large.train.learning_rate > many.train.learning_rate


def test_a_value_that_is_given_is_kept():
    given = {
        "model": {"channels": 24, "channel_multipliers": [1, 2, 2], "head_channels": 12},
        "train": {"images": 640, "learning_rate": 0.25, "warmup_images": 320},
    }
    config = derived(DatasetSize(64, 10_000), **given)
    assert config.model.model_dump(include=set(given["model"])) == {
        "channels": 24,
        "channel_multipliers": (1, 2, 2),
        "head_channels": 12,
    }
    assert config.model.attention_resolutions == (16,)
    assert (config.train.images, config.train.learning_rate) == (640, 0.25)
    assert derived(DatasetSize(64, 10_000), train={"warmup_images": 9_000_000}).train.images >= 9_000_000


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_configuration_that_we_ship_keeps_its_network_and_training(file):
    config = load_config(file)
    if config.reproduce.cells and config.reproduce.kind == "toy2d":
        pytest.skip("2-D experiments have a network of their own, and nothing is derived for them")
    preset = config_class(config)
    model = {"dropout": 0.1} if config.model.kind == "unet" else {"time_scale": 10.0}
    for variant in (
        config,
        preset(),
        preset.model_validate({"model": model, "train": {"zero_stage": 2}}),
    ):
        assert not absent_keys(variant).keys() & {"model", "train"}
        assert with_derived(variant, DatasetSize(64, 10**6)) == variant


def test_an_earlier_start_gives_its_own_values():
    recorded = RunConfig.model_validate(
        {
            "data": {"name": "kept", "source": {"url": "/a/pets"}},
            "model": {"channels": 96},
            "train": {"images": 7},
        }
    )
    config = RunConfig.model_validate(
        {"data": {"source": {"url": "/a/pets"}}, "train": {"learning_rate": 0.5}}
    )
    filled = with_values_of(config, recorded)
    assert (filled.data.name, filled.model.channels, filled.train.images) == ("kept", 96, 7)
    assert filled.train.learning_rate == 0.5


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("/photos/My pets/", "My-pets"),
        ("s3://bucket/cats.and_dogs", "cats.and_dogs"),
        ("pets", "pets"),
        ("/photos/.hidden", "hidden"),
        ("/photos/été", "t"),
        ("/", "images"),
        ("/photos/猫", "images"),
    ],
)
def test_a_data_set_is_named_after_its_folder(url, name):
    data = RunConfig.model_validate({"data": {"source": {"url": url}}}).data
    made = dataset_name(data)
    assert made == name
    RunConfig.model_validate({"data": {"name": made}})


@pytest.mark.parametrize(
    ("images", "held_out"), [(100_000, 500), (1_500, 500), (1_000, 100), (20, 4), (3, 2), (2, 1)]
)
def test_few_images_hold_out_fewer(images, held_out):
    assert validation_images_for(images) == held_out < images


def test_a_size_names_the_network():
    config = derived(DatasetSize(64, 100), model={"size": "imagenet64"})
    assert config.model == ModelSection.model_validate({"size": "imagenet64"})
