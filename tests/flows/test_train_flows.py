"""The flows from images to scores: one definition, their forms, and the configuration of train-images."""

import json
import logging

import pytest
import yaml
from prefect import Flow
from prefect.client.schemas.objects import StateType
from prefect.states import Completed
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

import flows.train as module
from flows.cancellation import effective_config
from flows.parameters import config_of
from flows.train import train_digits, train_imagenet64, train_images
from fm_core.config import load_config
from fm_core.config.derived_defaults import absent_keys
from fm_core.errors import UserError
from tests.support import ROOT

CONFIGS = ROOT / "infra" / "configs"


@pytest.fixture
def own_file(tmp_path):
    file = tmp_path / "pets.yaml"
    file.write_text("run: {name: pets}\ndata: {source: {url: /pets, image_size: 64}}\n")
    return file


@pytest.fixture
def started(monkeypatch):
    """Instead of the stages, a list of what would run: (configuration, stages, apart)."""
    calls = []

    def pipeline(config, stages, apart):
        calls.append((config, tuple(stages), apart))
        return Completed()

    monkeypatch.setattr(module, "pipeline", pipeline)
    monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("test"))
    return calls


@pytest.mark.parametrize("name", ["train-digits", "train-imagenet32", "train-imagenet64", "train-images"])
def test_entry_points_of_scheduled_flow_runs_still_load(name):
    entry_point = f"flows.train.{name.replace('-', '_')}"
    loaded = import_object(entry_point)
    assert isinstance(loaded, Flow)
    assert (loaded.name, loaded.fn.__name__) == (name, name.replace("-", "_"))
    assert loaded.on_cancellation_hooks
    assert (loaded.description or "").startswith("Shard, train, sample, score and report")
    deployments = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]
    assert entry_point in [deployment["entrypoint"] for deployment in deployments]


@pytest.mark.parametrize(("flow", "preset"), [(train_digits, "digits"), (train_imagenet64, "imagenet64")])
def test_a_preset_flow_runs_its_file_with_the_keys_that_are_given(flow, preset, started):
    flow.fn(**flow.validate_parameters({"config": {"train": {"images": 64000}}, "apart": ["shard"]}))
    ((config, stages, apart),) = started
    expected = load_config(CONFIGS / f"{preset}.yaml", {"train": {"images": 64000}})
    assert config.model_dump() == expected.model_dump()
    assert stages == ("shard", "train", "sample", "evaluate", "report")
    assert tuple(apart) == ("shard",)


def test_the_form_of_a_preset_shows_its_values():
    schema = parameter_schema(train_digits.fn)
    assert list(schema.properties) == ["config", "apart"]
    assert "179200" in json.dumps(schema.model_dump())


def test_the_form_of_train_images_asks_for_a_file_or_keys():
    schema = parameter_schema(train_images.fn)
    assert list(schema.properties) == ["config_file", "config", "apart"]
    assert not schema.required
    for name in ("config_file", "config", "apart"):
        assert schema.properties[name]["description"], name
    assert "128000" not in json.dumps(
        schema.model_dump()
    )  # defaults are derived later, not sent with the form


def test_a_file_a_tree_and_both_are_a_configuration(own_file, started):
    for parameters in (
        {"config_file": str(own_file)},
        {"config_file": str(own_file), "config": {"train": {"images": 7}}},
        {"config": {"run": {"name": "tree"}}},
    ):
        train_images.fn(**train_images.validate_parameters(parameters))
    file, both, tree = (config for config, _, _ in started)
    assert (file.run.name, both.run.name, tree.run.name) == ("pets", "pets", "tree")
    assert both.train.images == 7
    # Absent keys are still to be derived from the images.
    assert "channels" in absent_keys(file)["model"]
    assert "images" not in absent_keys(both)["train"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "config_file: name a configuration file"),
        ({"config_file": "missing.yaml"}, "missing.yaml: cannot be read"),
        ({"config": {"trian": {}}}, "config: trian: unknown key"),
    ],
)
def test_a_wrong_file_fails_with_one_line(parameters, message, started):
    state = train_images.fn(**train_images.validate_parameters(parameters))
    assert state.type == StateType.FAILED
    assert message in (state.message or "")
    assert "\n" not in (state.message or "")
    assert started == []


def test_without_labels_the_scores_are_left_out(own_file, started, monkeypatch):
    monkeypatch.setattr(module, "can_be_scored", lambda config: False)
    train_images.fn(config_file=str(own_file))
    assert started[0][1] == ("shard", "train", "sample", "report")


def test_a_cancelled_run_is_found_by_its_file(own_file):
    assert effective_config(train_images, {"config_file": str(own_file)}).run.name == "pets"
    assert effective_config(train_digits, {}).run.name == "digits"
    with pytest.raises(UserError):
        config_of({})
