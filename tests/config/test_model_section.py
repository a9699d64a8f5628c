"""Named sizes and keys that belong to one kind of network."""

from pathlib import Path

import pytest
import yaml

from fm_core.config import RunConfig, config_class, dump_yaml, load_config, parse_config
from fm_core.errors import UserError
from fm_core.models.build import build_meta_network, build_network
from fm_core.models.flops import parameter_count

IMAGENET64 = Path(__file__).parents[2] / "infra" / "configs" / "imagenet64.yaml"


def model(**keys):
    return parse_config({"model": keys}, "here").model


@pytest.mark.parametrize(
    ("size", "side", "millions"),
    [
        ("cifar10", 32, 171.3),
        ("imagenet32", 32, 228.1),
        ("imagenet64", 64, 295.1),
        ("imagenet128", 128, 542.8),
    ],
)
def test_a_named_size_is_the_paper_network(size, side, millions):
    network = build_meta_network(model(size=size), (3, side, side), 1000)
    assert round(parameter_count(network) / 1e6, 1) == millions


UNET = {"channels": 32, "attention_resolutions": [8]}


@pytest.mark.parametrize("keys", [UNET, {"size": "DiT-S/4"}])
def test_a_shape_is_that_of_the_network(keys):
    section = model(**keys, class_conditional=True)
    shape, made = (make(section, (3, 16, 16), 10) for make in (build_meta_network, build_network))
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert {name: p.shape for name, p in shape.named_parameters()} == {
        name: p.shape for name, p in made.named_parameters()
    }


def test_the_imagenet64_configuration_is_the_named_size():
    config = load_config(IMAGENET64)
    assert config.model == model(size="imagenet64")
    assert config.model.channels == 192


def test_a_size_survives_being_written_down():
    config = parse_config({"model": {"size": "DiT-B/4", "class_conditional": True}}, "here")
    assert config.model.kind == "transformer"
    assert parse_config(yaml.safe_load(dump_yaml(config)), "there") == config


def test_what_a_size_leaves_open_can_be_chosen():
    chosen = model(size="imagenet64", dropout=0.1, scale_shift=False)
    assert (chosen.channels, chosen.dropout, chosen.scale_shift) == (192, 0.1, False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": "imagenet64", "channels": 128}, "model.channels is 128, but model.size imagenet64 has 192"),
        ({"size": "DiT-S/2", "kind": "unet"}, "model.kind is unet"),
        ({"kind": "transformer", "channels": 64}, "model.channels is not a key of model.kind transformer"),
        ({"width": 64}, "model.width is not a key of model.kind unet"),
        ({"size": "imagenet65"}, "model.size"),
    ],
)
def test_keys_that_contradict_one_another_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        model(**keys)


def test_another_size_replaces_the_complete_shape_of_a_preset():
    preset = config_class(load_config(IMAGENET64))
    assert preset().model.channels == 192
    assert preset.model_validate({"model": {"dropout": 0.1}}).model.channels == 192
    for size in ("imagenet32", "DiT-S/2"):
        changed = preset.model_validate({"model": {"size": size}})
        assert changed.model.model_dump() == model(size=size).model_dump()
    own = preset.model_validate({"model": {"size": None, "channels": 64}})
    assert (own.model.channels, own.model.residual_blocks) == (64, 3)
    assert RunConfig.model_validate(own.model_dump()).model.channels == 64
