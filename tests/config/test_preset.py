"""Configuration classes whose defaults are those of a preset."""

import pytest

from fm_core.config import RunConfig, config_class, load_config
from tests.support import ROOT

PRESET = RunConfig.model_validate(
    {
        "run": {"name": "preset", "seed": 3},
        "data": {"source": {"format": "imagenet-npz", "url": "/archives", "image_size": 64}},
        "train": {"images": 1234, "learning_rate": 5e-4},
        "evaluate": {"likelihood": {"images": 77, "rtol": 1e-3}},
    }
)
MADE = config_class(PRESET)


def test_its_defaults_are_the_presets_at_every_depth():
    assert MADE().model_dump() == PRESET.model_dump()
    assert issubclass(MADE, RunConfig)


def test_naming_one_key_keeps_the_other_keys():
    config = MADE.model_validate(
        {"evaluate": {"likelihood": {"rtol": 1e-4}}, "data": {"source": {"image_size": 32}}}
    )
    assert config.evaluate.likelihood.images == 77
    assert config.evaluate.likelihood.rtol == 1e-4
    assert (config.data.source.url, config.data.source.image_size) == ("/archives", 32)
    assert config.train == MADE().train


def test_its_schema_shows_them():
    schema = MADE.model_json_schema()

    def section(name, inside=schema):
        reference = inside["properties"][name]
        reference = reference.get("$ref") or reference["allOf"][0]["$ref"]
        return schema["$defs"][reference.removeprefix("#/$defs/")]

    assert section("train")["properties"]["images"]["default"] == 1234
    likelihood = section("likelihood", section("evaluate"))
    assert likelihood["properties"]["images"]["default"] == 77
    assert section("source", section("data"))["properties"]["url"]["default"] == "/archives"
    plain = RunConfig.model_json_schema()["$defs"]["TrainSection"]["properties"]
    for name, shown in section("train")["properties"].items():
        assert shown["description"] == plain[name]["description"]


def test_its_schema_keeps_the_descriptions():
    for definition in MADE.model_json_schema()["$defs"].values():
        for name, key in definition["properties"].items():
            assert key.get("description") or "$ref" in str(key), name


def test_it_is_as_closed_as_the_tree():
    with pytest.raises(ValueError, match="imags"):
        MADE.model_validate({"train": {"imags": 1}})


def test_the_tree_itself_keeps_its_defaults():
    assert RunConfig().train.images != 1234
    assert RunConfig().evaluate.likelihood.images != 77


def test_a_caller_sets_launch_kind_debug_over_a_preset():
    """Sections of the generated class equal no section of the class that they come from."""
    kind = MADE.model_validate({"launch": {"kind": "debug"}}).launch.kind
    assert kind == "debug"


CONDITIONAL = {
    "digits": {
        "model": {"class_conditional"},
        "train": {"label_dropout", "keep_every_images"},
        "sample": {"class_mode", "solver", "steps", "guidance", "guidance_interval"},
        "sweep": {"axes"},
    },
    "imagenet64": {
        "model": {"class_conditional"},
        "train": {"label_dropout", "ema_power_widths", "snapshot_images"},
        "sample": {"class_mode", "solver", "steps"},
        "sweep": {"axes"},
    },
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_conditional_preset_differs_from_the_unconditional_one_in_what_it_names(name):
    plain, conditional = (
        load_config(ROOT / "infra" / "configs" / f"{file}.yaml").model_dump()
        for file in (name, f"{name}-conditional")
    )
    changed = {
        section: {key for key in plain[section] if plain[section][key] != conditional[section][key]}
        for section in plain
    }
    assert {section: keys for section, keys in changed.items() if keys} == CONDITIONAL[name] | {
        "run": {"name"}
    }
    assert conditional["model"]["class_conditional"]
    assert conditional["train"]["label_dropout"] == 0.1
    assert conditional["sample"]["images"] % {"digits": 10, "imagenet64": 1000}[name] == 0
