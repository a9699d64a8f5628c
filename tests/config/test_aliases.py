"""Former names of configuration keys: in files, overrides, on the command line and in Prefect parameters."""

from pathlib import Path

import jsonschema
import pytest

from flows.parameters import config_of
from fm_core.cli import main
from fm_core.config import RunConfig, config_class, dump_yaml, load_config, parse_config
from fm_core.config.tree import all_keys
from fm_core.errors import UserError
from fm_core.run.directory import recorded_config

OLD, NEW = {"report": {"neighbours": 4}}, {"report": {"neighbors": 4}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text("report: {neighbours: 4}\n")
    return path


def test_a_former_name_is_the_key(file: Path):
    assert parse_config(OLD, "x") == parse_config(NEW, "x") == load_config(file)
    assert "neighbours" not in dump_yaml(load_config(file))


def test_an_override_by_either_name_replaces_the_file_s(file: Path):
    for name in ("neighbours", "neighbors"):
        over = {"report": {name: 7}}
        assert load_config(file, over).report.neighbors == 7
        assert config_of({"config_file": str(file), "config": over}).report.neighbors == 7


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path):
    recorded = dump_yaml(parse_config(NEW, "x")).replace("neighbors", "neighbours")
    (tmp_path / "config.yaml").write_text(recorded)
    assert recorded_config(tmp_path).report.neighbors == 4


def test_both_names_at_once_are_refused():
    with pytest.raises(UserError, match=r"report.neighbours is an alias of report.neighbors: give one"):
        parse_config({"report": {"neighbours": 4, "neighbors": 5}}, "x")


@pytest.mark.parametrize("option", ["--report.neighbours", "--report.neighbors"])
def test_the_command_line_takes_either_name(file: Path, option: str, capsys):
    """A value that is refused shows that the option was read."""
    assert main(["report", "--config", str(file), option, "-1"]) == 2
    assert "report.neighbors" in capsys.readouterr().err


def test_prefect_s_schema_accepts_every_alias():
    schema = config_class(RunConfig()).model_json_schema()
    jsonschema.validate(OLD, schema)
    jsonschema.validate({"reproduce": {"experiments": []}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"report": {"nearest": 4}}, schema)
    assert {alias for alias, key in all_keys().items() if alias != key} == {
        "report.neighbours",
        "reproduce.experiments",
    }


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean train?"),
        ({"train": {"learning_rat": 1}}, "unknown key; did you mean train.learning_rate?"),
        ({"model": {"color": 1}}, "x: model.color: unknown key"),
        ({"train": {"lr": 1}}, "x: train.lr: unknown key"),  # and not: did you mean train?
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_resembles_it(tree, message: str):
    with pytest.raises(UserError) as error:
        parse_config(tree, "x")
    assert str(error.value).endswith(message)


def test_an_unknown_option_is_answered_with_the_one_that_resembles_it(file: Path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(file), "--train.learnig_rate", "1"])
    assert end.value.code == 2
    assert "did you mean --train.learning_rate?" in capsys.readouterr().err
