"""Former names of configuration keys: in files, overrides, on the command line and in Prefect parameters."""

from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import pytest
import yaml
from prefect import flow

from flows.parameters import config_of
from flows.presets import DIGITS
from fm_core.cli import main
from fm_core.config import RunConfig, dump_yaml, load_config, parse_config
from fm_core.config.tree import all_keys
from fm_core.errors import UserError
from fm_core.run.directory import identity, recorded_config

# Former name of a key, its name, and a value other than the default.
ALIASES = [
    ("report.neighbours", "report.neighbors", 4),
    ("evaluate.beside", "evaluate.online", {"images": 16}),
    ("evaluate.beside.images", "evaluate.online.images", 16),
    ("train.held_out_images", "train.validation_images", 64),
    ("reproduce.plane", "reproduce.toy2d", {"steps": 10}),
    ("reproduce.plane.steps", "reproduce.toy2d.steps", 10),
]


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def value_of(config: RunConfig, key: str) -> Any:
    value = attrgetter(key)(config)
    return value if isinstance(value, int) else value.model_dump(exclude_unset=True)


each_alias = pytest.mark.parametrize(("old", "new", "value"), ALIASES, ids=lambda part: str(part))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text("report: {neighbours: 4}\n")
    return path


@each_alias
def test_a_former_name_is_the_key(tmp_path: Path, old: str, new: str, value: Any):
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(nested(old, value)))
    expected = parse_config(nested(new, value), "x")
    assert value_of(expected, new) == value
    assert parse_config(nested(old, value), "x") == expected == load_config(file)
    assert load_config(file, nested(new, value)) == expected
    section, former = old.split(".")[:2]
    assert former not in yaml.safe_load(dump_yaml(expected))[section]


@each_alias
def test_an_override_by_either_name_replaces_the_file_s(tmp_path: Path, old: str, new: str, value: Any):
    file = tmp_path / "old.yaml"
    for first, second in ((old, new), (new, old), (old, old)):
        file.write_text(yaml.safe_dump(nested(first, value)))
        other = dict.fromkeys(value, 20) if isinstance(value, dict) else 20
        assert value_of(load_config(file, nested(second, other)), new) == other
        given = config_of({"config_file": str(file), "config": nested(second, other)})
        assert value_of(given, new) == other


@each_alias
def test_a_run_of_an_earlier_version_is_read_and_is_the_same_run(
    tmp_path: Path, old: str, new: str, value: Any
):
    config = parse_config(nested(new, value) | {"run": {"generator": "philox-v1"}}, "x")
    recorded = yaml.safe_load(dump_yaml(config))
    section, former = old.split(".")[:2]
    recorded[section][former] = recorded[section].pop(new.split(".")[1])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert attrgetter(new)(recorded_config(tmp_path)) == attrgetter(new)(config)
    assert identity(recorded_config(tmp_path)) == identity(config)


def test_a_recorded_comparison_in_two_dimensions_has_a_former_name_of_its_kind():
    assert parse_config({"reproduce": {"kind": "plane"}}, "x") == parse_config(
        {"reproduce": {"kind": "toy2d"}}, "x"
    )


@each_alias
def test_both_names_at_once_are_refused(old: str, new: str, value: Any):
    former, present = (".".join(key.split(".")[:2]) for key in (old, new))
    section = nested(old, value)[old.split(".")[0]] | nested(new, value)[old.split(".")[0]]
    with pytest.raises(UserError, match=f"{former} is an alias of {present}: give one"):
        parse_config({old.split(".")[0]: section}, "x")


@pytest.mark.parametrize(("old", "new", "value"), [each for each in ALIASES if isinstance(each[2], int)])
def test_the_command_line_takes_either_name(file: Path, old: str, new: str, value: int, capsys):
    """A value that is refused shows that the option was read."""
    for option in (old, new):
        assert main(["report", "--config", str(file), f"--{option}", "-1"]) == 2
        assert new in capsys.readouterr().err


def test_the_schema_of_a_form_accepts_every_alias():
    def run(config: Annotated[RunConfig, DIGITS.form(*RunConfig.model_fields)] = DIGITS.values) -> None:
        """Nothing."""

    schema = flow(name="form")(run).parameters.properties["config"]
    for old, _, value in ALIASES:
        jsonschema.validate(nested(old, value), schema)
    jsonschema.validate({"reproduce": {"experiments": [], "kind": "plane"}}, schema)
    wrong = (
        ("report.nearest", 4),
        ("evaluate.beside.imags", 1),
        ("reproduce.experiments", [{"name": "x", "y": 1}]),
    )
    for key, value in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(nested(key, value), schema)
    aliases = {alias: key for alias, key in all_keys().items() if alias != key}
    assert {old: new for old, new, _ in ALIASES}.items() <= aliases.items()
    former = {"report.neighbours", "reproduce.experiments", "reproduce.plane", "evaluate.beside"}
    assert {alias for alias in aliases if alias.count(".") == 1} == former | {"train.held_out_images"}


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
