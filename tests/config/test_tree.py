from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from fm_core.config import RunConfig, config_class, dump_yaml, load_config, merge, parse_config
from fm_core.config.section import Section
from fm_core.errors import UserError

ROOT = Path(__file__).parents[2]


def refused(tree) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tree, where="run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("run.yaml: ")
    return message


def leaves(section: type[BaseModel], prefix: str = ""):
    """(dotted name, field) of every key at every depth."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def sections(section: type[BaseModel]):
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


@pytest.mark.parametrize(
    ("tree", "fragments"),
    [
        ({"trian": {}}, ["trian", "unknown key"]),
        ({"train": {"imags": 5}}, ["train.imags", "unknown key"]),
        ({"evaluate": {"likelihood": {"image": 5}}}, ["evaluate.likelihood.image", "unknown key"]),
        ({"train": {"images": "many"}}, ["train.images", "integer", "'many'"]),
        ({"train": {"images": 0}}, ["train.images", "greater than or equal to 1", "0"]),
        ({"train": {"images": None}}, ["train.images", "None"]),
        ({"train": 3}, ["train", "3"]),
        ({"train": {"schedule": "cosin"}}, ["train.schedule", "cosine", "'cosin'"]),
        ({"run": {"name": "../elsewhere"}}, ["run.name", "'../elsewhere'"]),
        ({"sample": {"step": "last"}}, ["sample.step", "latest", "'last'"]),
        ({"train": {"ema_decays": []}}, ["train.ema_decays"]),
        ({"train": {"ema_decays": [1.0]}}, ["train.ema_decays"]),
        ({"method": {"path_options": {"sigma_min": [1]}}}, ["method.path_options.sigma_min", "[1]"]),
    ],
)
def test_a_wrong_key_is_refused_in_one_line_that_names_it(tree, fragments):
    message = refused(tree)
    for fragment in fragments:
        assert fragment in message, message


def test_several_mistakes_are_reported_together():
    message = refused({"train": {"imags": 5, "global_batch": 0}})
    assert "train.imags" in message
    assert "train.global_batch" in message


@pytest.mark.parametrize(
    "tree",
    [
        {"data": {"source": {"format": "imagenet-npz"}}},
        {"data": {"source": {"format": "imagenet-npz", "url": "/archives"}}},
        {"train": {"images": 10, "warmup_images": 11}},
        {"train": {"label_dropout": 0.1}},
        {"train": {"init_from": "a.pt", "init_source": "sit", "init_attention_order": "new"}},
        {"method": {"coupling": "reflow"}},
        {"data": {"pairs": {"samples": "/set"}}},
        {
            "method": {"coupling": "reflow"},
            "data": {"pairs": {"samples": "/set"}, "horizontal_flip": True},
        },
    ],
)
def test_sections_that_do_not_agree_are_refused_in_one_line(tree):
    assert "Value error" not in refused(tree)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "gradient_clip", "epsilon"])
def test_numbers_are_finite(key, value):
    assert f"train.{key}" in refused({"train": {key: value}})


IDLE = [
    ({"sample": {"cuda_graphs": True}}, "sample.cuda_graphs", {"sample": {"compile": False}}),
    (
        {"train": {"speed": {"compile_mode": "max-autotune-no-cudagraphs"}}},
        "train.speed.compile_mode",
        {"train": {"speed": {"compile": False}}},
    ),
    (
        {"train": {"speed": {"compile_channels_last": True}}},
        "train.speed.compile_channels_last",
        {"train": {"speed": {"compile": False}}},
    ),
    (
        {"train": {"init_attention_order": "new"}},
        "train.init_attention_order",
        {"train": {"init_from": None}},
    ),
    (
        {"data": {"pairs": {"validation_images": 9}}},
        "data.pairs.validation_images",
        {"data": {"pairs": {"samples": None}}},
    ),
    ({"launch": {"hostfile": "hosts"}}, "launch.hostfile", {"launch": {"kind": "local"}}),
    ({"launch": {"slurm": {"nodes": 2}}}, "launch.slurm", {"launch": {"kind": "local"}}),
]


@pytest.mark.parametrize(("tree", "key", "off"), IDLE, ids=[key for _, key, _ in IDLE])
def test_a_key_whose_switch_was_forgotten_is_refused(tree, key, off):
    assert f"{key} does nothing without" in refused(tree)
    # With the switch off explicitly, or in a file with every key, the other keys are accepted.
    config = parse_config(merge(tree, off), where="x")
    assert parse_config(config.model_dump(mode="json"), where="x") == config
    assert config_class(config)().model_dump() == config.model_dump()


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"format": "digits", "url": "/images"}, "url"),
        ({"image_size": 8}, "image_size"),
        ({"resize": "exact"}, "resize"),
        ({"format": "imagenet-npz", "url": "/a", "image_size": 64, "resize": "crop-adm"}, "resize"),
        ({"format": "cifar10", "url": "/a", "resize": "exact"}, "resize"),
    ],
)
def test_what_a_format_does_not_read_is_refused(source, key):
    assert f"data.source.{key} is not used by format" in refused({"data": {"source": source}})


@pytest.mark.parametrize("betas", [[1.0, 0.999], [0.9, 1.0], [-0.1, 0.9], [0.9, 1.5]])
def test_betas_of_the_optimizer_are_in_range(betas):
    message = refused({"train": {"betas": betas}})
    assert "train.betas must be at least 0 and below 1" in message
    assert parse_config({"train": {"betas": [0, 0.999]}}, where="x").train.betas == (0, 0.999)


@pytest.mark.parametrize("keys", [{"ema_decays": [0.9, 0.9]}, {"ema_power_widths": [0.1, 0.10000001]}])
def test_two_averages_have_two_names(keys):
    assert "two averages would have the same name" in refused({"train": keys})


def test_options_of_the_method_are_finite():
    assert "sigma_min" in refused({"method": {"path_options": {"sigma_min": float("inf")}}})


def test_integer_options_of_the_method_stay_integers():
    config = parse_config(
        {"method": {"coupling_options": {"block": 64}, "path_options": {"a": "1e-5"}}}, where="x"
    )
    assert type(config.method.coupling_options["block"]) is int
    assert config.method.path_options == {"a": 1e-5}
    assert parse_config(config.model_dump(mode="json"), where="x") == config


def test_options_may_be_strings_and_booleans_in_both_sections(tmp_path):
    options = {"divergence": "exact", "steps": "4", "rtol": "1e-5", "on": True}
    read = {"divergence": "exact", "steps": 4, "rtol": 1e-5, "on": True}
    cell = {"name": "cnf", "objective": "maximum-likelihood", "path": "optimal-transport"}
    tree = {
        "method": {"objective_options": options},
        "reproduce": {"cells": [{**cell, "objective_options": options}]},
    }
    config = parse_config(tree, where="x")
    for options in (config.method.objective_options, config.reproduce.cells[0].objective_options):
        assert options == read
        assert {key: type(value) for key, value in options.items()} == {
            "divergence": str,
            "steps": int,
            "rtol": float,
            "on": bool,
        }
    (tmp_path / "a.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "a.yaml") == config


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, float("nan")])
def test_an_invalid_option_is_refused_by_its_key(value):
    message = refused({"method": {"path_options": {"sigma_min": value}}})
    assert "method.path_options.sigma_min: expected a finite number, a string, true or false" in message


def test_a_standard_error_needs_two_images_to_score():
    assert "likelihood" in refused({"evaluate": {"likelihood": {"images": 1}}})


@pytest.mark.parametrize(
    "section", sorted(set(sections(RunConfig)), key=str), ids=lambda section: section.__name__
)
def test_every_section_has_a_description(section):
    assert section.__doc__


def test_every_key_has_a_description():
    keys = dict(leaves(RunConfig))
    assert len(keys) > 60
    assert [name for name, field in keys.items() if not field.description] == []


def test_every_key_has_a_default_that_is_accepted():
    tree = RunConfig().model_dump()
    assert parse_config(tree, where="defaults") == RunConfig()


def test_a_tree_survives_yaml(tmp_path):
    config = RunConfig.model_validate(
        {
            "run": {"name": "a.b-c_1", "seed": 7},
            "train": {"ema_decays": [0.9, 0.99], "learning_rate": 1e-4, "init_from": "yes"},
            "method": {"path_options": {"sigma_min": 1e-5}},
            "sample": {"step": 30, "rtol": 1e-7},
            "data": {"name": "1e3"},
        }
    )
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(config))
    assert load_config(file) == config
    assert load_config(file).data.name == "1e3"


def test_overrides_change_one_key_and_keep_the_others(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {images: 640, global_batch: 64}\nevaluate: {likelihood: {images: 8, batch: 4}}\n")
    config = load_config(file, {"evaluate": {"likelihood": {"images": 2}}})
    assert config.train.images == 640
    assert (config.evaluate.likelihood.images, config.evaluate.likelihood.batch) == (2, 4)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [", "a: 1\n\ta: 2\n", "\x00"])
def test_a_file_that_is_not_a_mapping_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_text_is_refused_in_one_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00run: \x80")
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert load_config(file) == RunConfig()


@pytest.mark.parametrize("file", sorted((ROOT / "infra" / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_configuration_in_infra_loads(file):
    config = load_config(file)
    assert config.run.name == file.resolve().stem  # one has a second name
    assert yaml.safe_load(file.read_text())["data"]["name"] == config.data.name


@pytest.mark.parametrize("name", ["digits", "imagenet32", "imagenet64"])
def test_a_comparison_trains_the_network_of_the_plain_run_by_its_recipe(name):
    plain, compared = (
        load_config(ROOT / "infra" / "configs" / f"{n}.yaml") for n in (name, f"reproduce-{name}")
    )
    assert compared.model == plain.model
    watched = {"log_images", "checkpoint_images", "keep_checkpoints", "validation_images", "speed"}
    assert compared.train.model_dump(exclude=watched) == plain.train.model_dump(exclude=watched)


def test_a_url_in_the_place_of_a_section_is_not_quoted():
    with pytest.raises(UserError, match=r"data\.source: .*, not a URL") as refusal:
        parse_config({"data": {"source": "s3://key:hunter2@bucket/pets"}}, "file")
    assert "hunter2" not in str(refusal.value)
