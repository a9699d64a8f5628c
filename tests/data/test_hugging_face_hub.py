"""Data sets of the Hugging Face hub: hf:// URLs, read by huggingface_hub from a fake server on loopback."""

import logging
import os
import subprocess
import sys

import fsspec
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.config.location import holds_secret
from fm_core.data.dataset_builder import check_source, write_dataset
from fm_core.data.shard_plan import make_plan
from fm_core.errors import UnreachableError, UserError
from fm_core.stages.init import init
from fm_core.storage import retries
from fm_core.training.throughput import Throughput
from tests.support.container_cases import hub as hub_rows
from tests.support.container_cases import hub_numbers, samples
from tests.support.hub_server import SIGNATURE, HubServer
from tests.support.layout_cases import classes, numbered
from tests.support.source_cases import numbers_by_class, tar, tree, zip_of

pytest.importorskip("huggingface_hub")

TOKEN = "hf_" + "thisIsTheTokenOfATest" * 2
FOLDERS = classes("Train/") | classes("validation/", 11)
ROWS = {"default/train/0.parquet": hub_rows(), "default/test/0.parquet": hub_rows(11)}
TARS = {"data/train-0.tar": tar(samples(1)), "data/val-0.tar": tar(samples(11))}
ZIPS = {"train.zip": zip_of(classes("")), "val.zip": zip_of(classes("", 11))}
WEBDATASET = ({0: [1, 3], 1: [2]}, {0: [11, 13], 1: [12]})
FOLDER = (numbered(1), numbered(11))
PARQUET = (hub_numbers(1), hub_numbers(11))


@pytest.fixture
def hub(monkeypatch):
    yield from serve(HubServer(), monkeypatch)


@pytest.fixture
def private_hub(monkeypatch):
    yield from serve(HubServer(TOKEN), monkeypatch)


def serve(server, monkeypatch):
    """The server, as fsspec's configuration names it; HF_ENDPOINT is read when the package is imported."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
    yield server
    server.close()


def config_of(folder, url, kind="auto", **options):
    source = {"format": kind, "url": url, "image_size": 8, "resize": "exact"}
    options = {"validation_images": 1, "workers": 1} | options
    return DataSection(root=str(folder), name="set", source=SourceSection.model_validate(source), **options)


@pytest.mark.parametrize(
    ("files", "revision", "below", "expected"),
    [
        (FOLDERS, "main", "", FOLDER),
        (ZIPS, "main", "", FOLDER),
        (ROWS, "main", "", PARQUET),
        (ROWS, "refs/convert/parquet", "", PARQUET),
        (ROWS, "v1.0", "/default", PARQUET),
        (TARS, "main", "", WEBDATASET),
        (TARS, "main", "/data/{train,val}-0.tar", WEBDATASET),
        (TARS, "v1.0", "/data/{train,val}-{0..0}.tar", WEBDATASET),
    ],
)
def test_a_data_set_of_the_hub_is_read_as_a_local_one(tmp_path, hub, files, revision, below, expected):
    url = hub.publish("someone/pets", tree(files), revision) + below
    manifest = write_dataset(config_of(tmp_path, url))
    folder = tmp_path / "set"
    assert (numbers_by_class(folder, "train"), numbers_by_class(folder, "val")) == expected
    assert manifest.source_url == url
    assert any(request.startswith("GET /stored/") for request in hub.requests)


def test_several_processes_read_the_hub(tmp_path, hub):
    config = config_of(tmp_path, hub.publish("someone/pets", tree(FOLDERS)), workers=2, block_bytes=1024)
    write_dataset(config)
    assert numbers_by_class(tmp_path / "set", "train") == numbered(1)


def test_another_content_of_the_same_size_is_a_change(tmp_path, hub):
    files = tree(classes(""))
    url = hub.publish("someone/pets", files)
    first = make_plan(config_of(tmp_path, url, "folder")).source.state()
    changed = {name: content[:-1] + b"x" for name, content in files.items()}
    fsspec.filesystem("hf").invalidate_cache()
    hub.publish("someone/pets", changed)
    assert make_plan(config_of(tmp_path, url, "folder")).source.state() != first


@pytest.mark.parametrize("kind", ["auto", "folder", "parquet"])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://datasets/someone/none", r"hf://datasets/someone/none: .*repository not found"),
        ("hf://datasets/someone/pets@v9", r"hf://datasets/someone/pets@v9: .*revision not found"),
        ("hf://datasets/someone/pets/none", r"under hf://datasets/someone/pets/none"),
        ("hf://datasets/someone", r"hf://datasets/someone: Invalid HF URI .*; check the URL"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_in_one_line(tmp_path, hub, kind, url, message):
    hub.publish("someone/pets", tree(FOLDERS))
    with pytest.raises(UserError, match=message) as refusal:
        check_source(config_of(tmp_path, url, kind))
    assert "\n" not in str(refusal.value)


def test_tars_that_the_hub_does_not_have_are_refused_by_name(tmp_path, hub):
    url = hub.publish("someone/pets", tree(TARS)) + "/data/train-{0..1}.tar"
    with pytest.raises(UserError, match=r"hf://datasets/someone/pets/data/train-1\.tar does not exist"):
        check_source(config_of(tmp_path, url))


def test_a_busy_hub_is_asked_again(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.failing = 3
    write_dataset(config_of(tmp_path, hub.publish("someone/pets", tree(FOLDERS))))
    assert numbers_by_class(tmp_path / "set", "train") == numbered(1)


def test_a_hub_out_of_reach_is_one_line(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": "http://127.0.0.1:9"})
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    with pytest.raises(UnreachableError, match=r"hf://datasets/someone/pets: tried 2 times") as caught:
        check_source(config_of(tmp_path, "hf://datasets/someone/pets"))
    assert "\n" not in str(caught.value)


def test_a_private_data_set_looks_like_none_without_its_token(tmp_path, private_hub):
    url = private_hub.publish("someone/pets", tree(FOLDERS))
    with pytest.raises(UserError, match="make sure you are authenticated"):
        check_source(config_of(tmp_path, url))


def test_a_token_is_in_no_file_and_no_line(tmp_path, private_hub, monkeypatch, caplog, capfd):
    url = private_hub.publish("someone/pets", tree(ROWS))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    write_dataset(config_of(tmp_path, url))
    assert numbers_by_class(tmp_path / "set", "train") == hub_numbers(1)
    with pytest.raises(UserError) as refusal:
        check_source(config_of(tmp_path / "other", f"{url}@v9"))
    output = capfd.readouterr()
    texts = [
        str(refusal.value),
        output.out,
        output.err,
        *(path.read_text("latin-1") for path in files(tmp_path)),
    ]
    assert all(secret not in text for secret in (TOKEN, SIGNATURE) for text in texts)
    ours = [
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    ]
    assert all(TOKEN not in line for line in ours)


def test_the_command_reads_the_hub_that_the_environment_names(tmp_path, private_hub):
    """As a user starts it: endpoint and token in the environment, and a run with its config.yaml."""
    url = private_hub.publish("someone/pets", tree(FOLDERS))
    environment = os.environ | {
        "HF_ENDPOINT": private_hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
    }
    (tmp_path / "set.yaml").write_text(f"data: {{source: {{url: '{url}', image_size: 8}}}}")
    arguments = ["--data.root", "sets", "--run.root", "runs", "--data.workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "fm_core", "shard", "--config", "set.yaml", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert numbers_by_class(tmp_path / "sets/pets", "train") == numbered(1)
    texts = [done.stdout, done.stderr, *(path.read_text("latin-1") for path in files(tmp_path))]
    assert all(TOKEN not in text for text in texts)


def test_fm_init_writes_a_configuration_for_a_data_set_of_the_hub(tmp_path, private_hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url = private_hub.publish("someone/pets", tree(ROWS))
    made = init(url, size=8, measure=lambda *_: Throughput(1e5, 1, "a test", None))
    assert made.path.name == "pets.yaml"
    assert made.source.splits == {"train": 5, "val": 5}
    assert url in made.path.read_text()
    assert TOKEN not in made.path.read_text() + made.text()
    with pytest.raises(UserError, match="a password or a token in it") as refusal:
        init(f"{url}?token={TOKEN}", measure=lambda *_: Throughput(1e5, 1, "a test", None))
    assert TOKEN not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        f"hf://user:{TOKEN}@datasets/someone/pets",
        f"hf://{TOKEN}@datasets/someone/pets",
        f"hf://datasets/someone/pets?token={TOKEN}",
        f"https://huggingface.co/datasets/someone/pets/resolve/main/a.tar?{TOKEN}",
    ],
)
def test_a_token_in_the_url_is_refused_without_quoting_it(tmp_path, url):
    assert holds_secret(url)
    with pytest.raises(ValueError, match="a token in it") as refusal:
        SourceSection(format="parquet", url=url, image_size=8)
    assert TOKEN not in str(refusal.value)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]
