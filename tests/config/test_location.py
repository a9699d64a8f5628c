"""Locations in the configuration: no credentials, ~ expanded, and keys of a YAML file are unique."""

import json
from pathlib import Path

import jsonschema
import pytest

from fm_core.config import config_class, load_config, parse_config
from fm_core.errors import UserError
from fm_core.storage.retries import one_line
from tests.support import ROOT

SECRETS = [
    "s3://AKIAKEY:very-secret@bucket/x",
    "sftp://me:very-secret@host/x",
    "https://user:very-secret@host/x.zip",
    "https://host/x.zip?token=very-secret",
    "https://host/x?X-Amz-Credential=a&X-Amz-Signature=very-secret",
    "https://account.blob/x?sv=2024&sig=very-secret",
    "simplecache::https://host/x?access_token=very-secret",
    "filecache::s3://key:very-secret@bucket/x",
    "s3://AKIAKEY:a/slash/very-secret@bucket/x",
    "sftp://me:2222very-secret@host/x",
    "https://host/x?AWSAccessKeyId=very-secret&Expires=1",
    "https://host/x?X-Goog-Signature=very-secret",
    "https://host/x?api_key=very-secret",
    "https://host/x?a=b&refresh_token=very-secret#part",
]
HARMLESS = [
    "datasets",
    "/data/a:b@c",
    "s3://bucket/x",
    "sftp://me@host/x",
    "abfs://container@account.dfs.core.windows.net/x",
    "github://organization:repository@main/x",
    "hf://datasets/a/b@main",
    "https://host/x?version=2&monkey=1",
    "memory://x",
    "https://host:8080/a@b",
    "s3://bucket/monkey=1/donkey=2",
    "sftp://me@host:2222/x",
]


def with_value(key: str, value: str) -> dict:
    tree: dict = {}
    *sections, last = key.split(".")
    at = tree
    for section in sections:
        at = at.setdefault(section, {})
    at[last] = value
    return tree


KEYS = [
    *("data.root", "data.source.url", "data.label_map", "data.cache", "train.checkpoint_root"),
    *("train.checkpoint_staging", "train.init_from", "train.prometheus", "sample.root", "sample.weights"),
    *("evaluate.weights", "evaluate.samples", "evaluate.reference", "evaluate.reference_out"),
    "evaluate.output",
    *("export.folder", "launch.hostfile", "run.root"),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_url_with_credentials_is_refused_for_every_key_without_repeating_them(key: str):
    for url in SECRETS:
        with pytest.raises(UserError) as refused:
            parse_config(with_value(key, url), "file.yaml")
        message = str(refused.value)
        assert message.startswith(f"file.yaml: {key}: a URL with a password or a token in it")
        assert "AWS_ACCESS_KEY_ID" in message
        assert "very-secret" not in message


def test_a_token_in_the_place_of_the_user_is_refused():
    with pytest.raises(UserError, match="a password or a token"):
        parse_config({"data": {"root": "https://very-secret@host/x"}}, "")


def test_urls_without_credentials_are_accepted():
    for url in HARMLESS:
        assert parse_config({"data": {"root": url}}, "").data.root == url


def test_prefect_refuses_such_a_parameter_before_it_stores_it():
    model = config_class(load_config(ROOT / "infra" / "configs" / "digits.yaml"))
    schema = json.loads(json.dumps(model.model_json_schema()))
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.check_schema(schema)
    for url in SECRETS:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({"data": {"root": url}})
    for url in HARMLESS:
        validator.validate({"data": {"root": url, "source": {"url": url}}})


@pytest.mark.parametrize("key", KEYS)
def test_a_tilde_is_expanded_for_every_key(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = with_value(key, "~/x")
    if key == "launch.hostfile":
        tree["launch"]["kind"] = "ssh"
    value = parse_config(tree, "")
    for part in key.split("."):
        value = getattr(value, part)
    assert value == str(tmp_path / "x")


@pytest.mark.parametrize("url", SECRETS)
def test_errors_of_libraries_are_shown_without_the_credentials_they_quote(url: str):
    shown = one_line(OSError(f"403 for url='{url}', sorry"))
    assert "very-secret" not in shown
    assert "sorry" in shown


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("train:\n  images: 100\nrun: {name: x}\ntrain:\n  learning_rate: 1.0e-3\n", "train", (1, 4)),
        ("train:\n  images: 100\n  log_images: 10\n  images: 200\n", "images", (2, 4)),
        ("train: {images: 1, images: 2}\n", "images", (1, 1)),
        ('run:\n  name: a\n  "name": b\n', "name", (2, 3)),
    ],
)
def test_a_duplicate_key_is_refused_with_its_lines(
    text: str, key: str, lines: tuple[int, int], tmp_path: Path
):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(file)
    first, second = lines
    assert str(refused.value) == f"{file}: the key {key} appears in lines {first} and {second}; merge the two"


def test_merged_mappings_may_override_their_keys(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text("run: &base {name: a, seed: 1}\nsample: {seed: 3}\nrun2: &b\n  <<: *base\n  name: b\n")
    with pytest.raises(UserError, match="run2: unknown key"):  # and nothing about a repeated one
        load_config(file)


def test_a_preset_s_format_stays_when_only_a_url_is_given():
    for name, expected in {"imagenet64": "imagenet-npz", "digits": "auto"}.items():
        preset = config_class(load_config(ROOT / "infra" / "configs" / f"{name}.yaml"))
        given = preset.model_validate({"data": {"source": {"url": "/empty"}}})
        assert given.data.source.format == expected
    # (digits has no files, so that a URL always means another format)
