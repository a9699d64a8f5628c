"""Presets as types of parameters; where the flows can run, and that this checkout's packages come first."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from prefect import Flow, flow
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import ParameterSchema
from prefect.utilities.schema_tools.validation import validate
from pydantic import BaseModel

from flows.presets import (
    CONFIGS,
    DIGITS,
    IMAGENET64,
    REPRODUCE_DIGITS,
    Preset,
    config_schema,
    without_references,
)
from flows.stages import evaluate_model, sample_images, shard_dataset, train_model
from flows.train import train_digits
from fm_core.config import RunConfig, load_config
from fm_core.config.derived_defaults import DatasetSize, with_derived
from fm_core.config.section import Section
from fm_core.run.directory import IDENTITY
from tests.support import ROOT

SIZE = DatasetSize(side=8, images=1_737)
SHOW = "python -c 'import flows; print(flows.__file__)'; env | grep -c '^PIP_TARGET' || true"


def test_the_schema_of_a_flow_has_the_presets_values_at_every_depth():
    schema = train_digits.parameters.model_dump()
    shown = schema["properties"]["config"]
    assert "$ref" not in json.dumps(schema)
    values = load_config(CONFIGS / "digits.yaml")
    assert shown["properties"]["train"]["properties"]["images"]["default"] == values.train.images
    likelihood = shown["properties"]["evaluate"]["properties"]["likelihood"]
    assert likelihood["properties"]["rtol"]["default"] == values.evaluate.likelihood.rtol
    assert likelihood["properties"]["rtol"]["description"]
    assert (likelihood["title"], shown["properties"]["train"]["title"]) == ("Likelihood", "Train")
    assert shown["default"] == values.model_dump(mode="json")


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        ({}, []),
        ({"train": {"images": 64}, "evaluate": {"likelihood": {"images": 7}}}, []),
        ({"train": {"imags": 64}}, ["config.train"]),
        ({"evaluate": {"likelihood": {"images": "many"}}}, ["config.evaluate.likelihood.images"]),
        ({"sample": {"guide": {"step": []}}}, ["config.sample.guide.step"]),
        ({"sweep": 3}, ["config.sweep"]),
        ({"sweep": None}, ["config.sweep"]),
        ({"evaluate": {"beside": {"imags": 7}}}, ["config.evaluate.beside"]),
        ({"evaluate": {"beside": {"images": 7}}}, []),
        ({"evaluate": {"beside": 7}}, ["config.evaluate.beside"]),
    ],
)
def test_the_server_refuses_unknown_keys_and_wrong_types_at_every_depth(config, problems: list[str]):
    errors = validate({"config": config}, train_digits.parameters.model_dump())
    assert [error.json_path.removeprefix("$.") for error in errors] == problems


def test_absent_keys_have_the_presets_values_and_a_wrong_key_is_named_with_its_path():
    given = train_digits.validate_parameters({"config": {"train": {"images": 10**6}}})["config"]
    values = load_config(CONFIGS / "digits.yaml")
    assert isinstance(given, RunConfig)
    assert given.train.images == 10**6
    assert given.train.global_batch == values.train.global_batch
    assert given.evaluate.model_dump() == values.evaluate.model_dump()
    with pytest.raises(ParameterTypeError, match=r"config\.train\.imags"):
        train_digits.validate_parameters({"config": {"train": {"imags": 64}}})


@pytest.mark.parametrize("preset", [DIGITS, IMAGENET64, REPRODUCE_DIGITS], ids=lambda preset: preset.name)
def test_a_run_without_parameter_has_the_configuration_of_one_with_an_empty_tree(preset: Preset):
    absent, empty = preset.complete(preset.values), preset.complete({})
    assert absent.model_dump() == empty.model_dump()
    assert list(given(absent)) == list(given(empty)) != []
    assert with_derived(absent, SIZE).model_dump() == with_derived(empty, SIZE).model_dump()


def given(section: BaseModel, place: str = "") -> Iterator[str]:
    """Full names of the keys that a file, a preset or a caller sets."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from given(value, f"{place}{name}.")
        elif isinstance(section, Section) and section.given(name):
            yield f"{place}{name}"


def test_a_configuration_has_the_presets_values_for_the_keys_that_it_does_not_set():
    mine = RunConfig.model_validate({"run": {"name": "mine"}})
    completed = IMAGENET64.complete(mine)
    assert completed.run.name == "mine"
    assert completed.train.model_dump() == IMAGENET64.values.train.model_dump() != mine.train.model_dump()


@pytest.mark.parametrize("stage", [train_model, sample_images, evaluate_model], ids=lambda stage: stage.name)
def test_the_form_of_a_stage_of_a_run_shows_all_that_identifies_the_run(stage: Flow[..., Any]):
    shown = stage.parameters.properties["config"]["properties"]
    assert {*IDENTITY, "run", "train", "launch", "sample"} <= {
        name for name in shown if "properties" in shown[name]
    }


def test_sections_that_a_flow_does_not_use_are_accepted_as_json_and_checked_by_the_run():
    schema = shard_dataset.parameters.model_dump()
    shown = schema["properties"]["config"]["properties"]
    assert {name for name in shown if "properties" in shown[name]} == {"run", "data"}
    assert list(shown) == list(RunConfig.model_fields)
    assert validate({"config": {"train": {"imags": 64}}}, schema) == []
    with pytest.raises(ParameterTypeError, match=r"config\.train\.imags"):
        shard_dataset.validate_parameters({"config": {"train": {"imags": 64}}})


def test_the_schema_of_a_form_is_that_of_the_class_of_the_preset():
    generated = without_references(schema := DIGITS.config_class.model_json_schema(), schema.pop("$defs"))
    form = form_of(DIGITS, *RunConfig.model_fields).properties["config"]
    assert without_titles(form["properties"]) == without_titles(generated["properties"])


def form_of(preset: Preset, *sections: str) -> ParameterSchema:
    def run(config: Annotated[RunConfig, preset.form(*sections)] = preset.values) -> None:
        """Nothing."""

    return flow(name="form")(run).parameters


def without_titles(part: Any) -> Any:
    """What of a schema decides which values are accepted, and the default values."""
    if isinstance(part, list):
        return [without_titles(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {name: without_titles(item) for name, item in part.items() if name not in ("title", "position")}


def test_a_form_leaves_the_schema_of_the_configuration_as_it_is():
    """All forms are made from it."""
    before = json.dumps(config_schema())
    forms = [form_of(IMAGENET64, section) for section in ("run", "train")]
    assert "properties" in forms[1].properties["config"]["properties"]["train"]
    assert "properties" not in forms[0].properties["config"]["properties"]["train"]
    assert json.dumps(config_schema()) == before


def test_flows_that_were_installed_as_a_wheel_say_what_they_need(tmp_path: Path):
    shutil.copytree(ROOT / "flows", tmp_path / "flows")
    done = subprocess.run(
        [sys.executable, "-c", "import flows.presets"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: the flows read their presets from {tmp_path}/infra/configs")
    assert last.endswith("installed with pip install --editable")


def test_another_package_flows_on_pythonpath_does_not_come_first(tmp_path: Path):
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    script = f". infra/environment.sh; cd /; {SHOW}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "FM_ENVIRONMENT": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[0] == f"{ROOT}/flows/__init__.py", done.stderr


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"pip"*" config list"*) cat "$FAKE/pip.conf" ;;
*"pip install"*)
    env | grep '^PIP_' | sort >"$FAKE/variables"
    touch "$FAKE/project/.venv/bin/prefect"
    chmod +x "$FAKE/project/.venv/bin/prefect" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose environment has a python that only records how pip is called."""
    project = tmp_path / "project"
    (project / "infra").mkdir(parents=True)
    shutil.copy(ROOT / "infra" / "environment.sh", project / "infra")
    (project / "infra" / "constraints.txt").touch()
    (project / "pyproject.toml").touch()
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (tmp_path / "pip.conf").touch()
    return project


def install(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "FM_"))}
    return subprocess.run(
        ["bash", "infra/environment.sh"],
        cwd=project,
        env={**inherited, "FAKE": str(project.parent), "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
    )


def test_settings_of_pip_that_install_elsewhere_do_not_hold(project: Path):
    elsewhere = {"PIP_USER": "1", "PIP_TARGET": "/x", "PIP_PREFIX": "/x", "PIP_ROOT": "/x"}
    done = install(project, **elsewhere, PIP_INDEX_URL="https://index")
    assert done.returncode == 0, done.stdout + done.stderr
    variables = (project.parent / "variables").read_text().split()
    assert variables == ["PIP_INDEX_URL=https://index", "PIP_USER=0"]
    assert (project / ".venv" / "complete").exists()


def test_a_target_in_pip_conf_is_refused_by_name(project: Path):
    (project.parent / "pip.conf").write_text("global.index-url='x'\ninstall.target='/opt/x'\n")
    done = install(project)
    assert done.returncode == 2
    assert "pip.conf says install.target='/opt/x'" in done.stderr
    assert not (project / ".venv" / "complete").exists()
