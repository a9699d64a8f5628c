"""Exports in repositories of the Hugging Face hub, by huggingface_hub and a fake server on loopback."""

import logging
import os
import subprocess
import sys
from importlib import reload

import pytest
import torch

import fm_core
from fm_core.config import dump_yaml, load_config
from fm_core.errors import UserError
from fm_core.sampling import model_hub as hub_module
from fm_core.sampling.model_hub import SUMS, download_export, push_export, sums_of
from fm_core.stages.export import export
from tests.support import ROOT
from tests.support.model_hub_server import ModelHubServer, metadata_errors
from tests.support.random_checkpoint import checkpoint, config_at, config_path

TOKEN = "hf_" + "thisIsTheTokenOfATest" * 2
NAME = "someone/digits"
FILES = {"model.safetensors", "config.yaml", "scores.json", "README.md", "SHA256SUMS"}


@pytest.fixture
def model_hub(monkeypatch, tmp_path):
    """The fake hub, to which huggingface_hub talks with a token, an empty cache, and plain HTTP."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ModelHubServer(TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.close()


def config_with(tmp_path, **keys):
    config = config_at(tmp_path)
    return config.model_copy(update={"export": type(config.export).model_validate({"hub": NAME, **keys})})


@pytest.fixture
def run(tmp_path):
    config = config_with(tmp_path)
    checkpoint(config)
    return config


def pushed(run, tmp_path, **keys):
    return export(config_with(tmp_path, push=True, **keys))


def test_what_is_pushed_comes_back_and_samples_the_same_images(run, tmp_path, model_hub):
    result = pushed(run, tmp_path)
    assert result.paths["commit"].startswith(f"{model_hub.url}/{NAME}/commit/")
    assert model_hub.visibility[NAME] == "private"
    assert set(model_hub.files(NAME)) == FILES | {".gitattributes"}
    here = fm_core.load(result.paths["folder"], device="cpu").sample(3, solver="euler", steps=2)
    there = fm_core.load(f"hf://{NAME}", device="cpu").sample(3, solver="euler", steps=2)
    assert torch.equal(here, there)
    assert model_hub.refused_metadata == 0
    assert any(request.startswith("PUT /upload/") for request in model_hub.requests)


def test_a_revision_names_an_earlier_export(run, tmp_path, model_hub):
    pushed(run, tmp_path)
    first = model_hub.oid(NAME, len(model_hub.commits[NAME]) - 1)
    checkpoint(run, step=9, seed=1)
    pushed(run, tmp_path, private=False)
    assert model_hub.visibility[NAME] == "private"  # that of an existing repository is kept
    steps = [fm_core.load(f"hf://{NAME}{at}", device="cpu").model.step for at in ("", f"@{first}", "@main")]
    assert steps == [9, 7, 9]
    with pytest.raises(UserError, match=rf"hf://{NAME}@v9: [^\n]*[Rr]evision[^\n]*$"):
        download_export(f"hf://{NAME}@v9")


def test_only_what_the_export_wrote_is_downloaded(run, tmp_path, model_hub):
    pushed(run, tmp_path)
    model_hub.put(NAME, "optimizer.pt", b"a pickle")
    model_hub.put(NAME, "README.md", b"edited by its owner")
    model_hub.requests.clear()
    folder = download_export(f"hf://{NAME}")
    assert {path.name for path in folder.iterdir()} == FILES
    assert not [request for request in model_hub.requests if "optimizer" in request]


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "scores.json"])
def test_a_file_that_differs_from_its_hash_is_refused_by_name(run, tmp_path, model_hub, name):
    pushed(run, tmp_path)
    content = bytearray(model_hub.files(NAME)[name])
    content[-1] ^= 1
    model_hub.put(NAME, name, bytes(content))
    with pytest.raises(UserError, match=rf"^hf://{NAME}: {name} differs from its hash in {SUMS}"):
        fm_core.load(f"hf://{NAME}")
    model_hub.put(NAME, name, None)
    with pytest.raises(UserError, match=name):
        fm_core.load(f"hf://{NAME}")


def test_a_repository_of_pickles_is_refused_without_downloading_it(model_hub):
    model_hub.put(NAME, "pytorch_model.bin", b"a pickle")
    with pytest.raises(
        UserError, match=r"has no model\.safetensors.*pytorch_model\.bin is a pickle and is not"
    ):
        download_export(f"hf://{NAME}")
    assert not [request for request in model_hub.requests if "resolve" in request]


def test_a_private_model_looks_like_none_without_its_token(run, tmp_path, model_hub, monkeypatch):
    pushed(run, tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    for name in (NAME, "someone/none"):
        with pytest.raises(UserError, match=rf"^hf://{name}: [^\n]*(not found|authenticated)[^\n]*$"):
            download_export(f"hf://{name}")
    with pytest.raises(UserError, match=r"^export\.push: set HF_TOKEN to a token of the hub that may write"):
        pushed(run, tmp_path)


def test_a_wrong_token_is_refused_in_one_line_without_quoting_it(run, tmp_path, model_hub, monkeypatch):
    wrong = "hf_" + "wrong" * 8
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(UserError, match=rf"hf://{NAME}: [^\n]*401[^\n]*$") as refusal:
        pushed(run, tmp_path)
    assert wrong not in str(refusal.value)


def test_the_commands_push_and_load_without_a_trace_of_the_token(run, tmp_path, model_hub, caplog):
    """As a user starts them: endpoint, token and cache in the environment."""
    (tmp_path / "r.yaml").write_text(dump_yaml(run))
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    caplog.set_level(logging.DEBUG)

    def call(*command):
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    options = ("--config", "r.yaml", "--export.license", "apache-2.0", "--export.push", "true")
    done = call("-m", "fm_core", "export", *options)
    assert done.returncode == 0, done.stderr
    script = f"import fm_core; print(fm_core.load('hf://{NAME}', device='cpu').model.step)"
    loaded = call("-c", script)
    assert loaded.stdout == "7\n", loaded.stderr
    assert b"license: apache-2.0" in model_hub.files(NAME)["README.md"]
    texts = [done.stdout, done.stderr, loaded.stdout, loaded.stderr, caplog.text]
    texts += [path.read_text("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    texts += [content.decode("latin-1") for content in model_hub.files(NAME).values()]
    assert all(TOKEN not in text for text in texts)


def test_the_hub_that_the_environment_names_is_asked_even_if_the_package_was_imported_before(model_hub):
    model_hub.put(NAME, "model.bin", b"")
    with pytest.raises(UserError, match="pickle"):
        download_export(f"hf://{NAME}")
    assert model_hub.requests


class TestWithoutAHub:
    def test_the_folder_has_metadata_hashes_and_no_places_of_this_machine(self, run, tmp_path):
        result = export(run)
        folder = config_path(run) / "export" / "step-00000007-ema"
        assert result.paths == {"folder": str(folder)}
        assert {path.name for path in folder.iterdir()} == FILES
        assert (folder / SUMS).read_text() == sums_of(folder)
        assert "README.md" not in (folder / SUMS).read_text()
        card = (folder / "README.md").read_text()
        assert metadata_errors(card) == []
        assert f'fm_core.load("hf://{NAME}")' in card
        assert "\nlicense:" not in card
        assert result.summary.endswith("; its card states no license (export.license)")
        assert "license" not in export(config_with(tmp_path, license="mit")).summary
        export(run)
        config = (folder / "config.yaml").read_text()
        assert str(tmp_path) not in config + (folder / "README.md").read_text()
        again = load_config(folder / "config.yaml")
        assert (again.model, again.method, again.sample.solver) == (run.model, run.method, "euler")
        assert export(run).state == "verified"
        (folder / "config.yaml").write_text("changed")
        assert export(run).state == "done"

    def test_without_the_key_the_folder_is_as_before(self, run):
        plain = run.model_copy(update={"export": type(run.export)()})
        folder = export(plain).paths["folder"]
        files = {path.name for path in (config_path(run) / "export" / "step-00000007-ema").iterdir()}
        assert files == FILES - {SUMS}
        assert not open(f"{folder}/README.md").read().startswith("---")  # noqa: SIM115, PTH123

    @pytest.mark.parametrize(
        "url", ["hf://", "hf://someone", "hf://a/b/c", "hf://datasets/a/b", "hf://a/b@", "hf://a/b?x=1"]
    )
    def test_other_urls_are_refused_in_one_line(self, url):
        with pytest.raises(UserError, match=r"write hf://USER/NAME or hf://USER/NAME@REVISION$"):
            fm_core.load(url)

    def test_a_token_in_the_url_is_refused_without_quoting_it(self):
        with pytest.raises(UserError, match="put the token into HF_TOKEN") as refusal:
            fm_core.load(f"hf://user:{TOKEN}@someone/digits")
        assert TOKEN not in str(refusal.value)

    def test_without_the_package_one_line_says_what_to_install(self, run, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        for call in (
            lambda: fm_core.load("hf://someone/digits"),
            lambda: push_export(tmp_path, NAME, True, ""),
            lambda: pushed(run, tmp_path),
        ):
            with pytest.raises(UserError, match=r"huggingface_hub is not installed; pip install .*\[hf\]"):
                call()

    @pytest.mark.parametrize("keys", [{"push": True}, {"private": False}, {"license": "mit"}])
    def test_keys_that_do_nothing_without_a_repository_are_refused(self, run, keys):
        with pytest.raises(ValueError, match=rf"export\.{next(iter(keys))} does nothing without export\.hub"):
            type(run.export).model_validate(keys)

    @pytest.mark.parametrize("name", ["digits", "a/b/c", "../x", "a/b c", "hf://a/b"])
    def test_names_of_no_repository_are_refused(self, run, name):
        with pytest.raises(ValueError, match="hub"):
            type(run.export).model_validate({"hub": name})


def test_the_module_needs_no_hub_to_be_imported():
    assert reload(hub_module).FILES
