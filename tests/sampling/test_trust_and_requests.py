"""Weights import only trusted code, and sampling to a store takes a bounded number of requests per batch."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import fm_core
from fm_core.cli import main
from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import UserError
from fm_core.sampling.checkpoint_source import load_model, weights_file
from tests.support.random_checkpoint import CPU, checkpoint, config_at, config_path, make

EVIL = """
import pathlib
from fm_core.method.paths import OptimalTransport
pathlib.Path(__file__).with_name("it-ran").touch()
class Evil(OptimalTransport):
    name = "evil"
"""


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder on the import path with a module that writes a file when it is imported."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil_paths.py").write_text(EVIL)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("evil_paths", None)


@pytest.fixture
def weights(tmp_path: Path, evil: Path) -> Path:
    """The weights of an exported folder, whose recipe names the module."""
    config = config_at(tmp_path)
    method = config.method.model_dump(mode="json") | {"path": "evil_paths:Evil"}
    folder = checkpoint(config, method=method)
    (evil / "export").mkdir()
    shutil.copy(folder / "raw.safetensors", evil / "export" / "model.safetensors")
    return evil / "export" / "model.safetensors"


def test_code_that_only_a_file_names_is_refused_in_one_line_and_not_imported(weights: Path, evil: Path):
    for where in (weights, weights.parent):
        with pytest.raises(UserError) as refused:
            fm_core.load(where, device="cpu")
        message = str(refused.value)
        assert "the path evil_paths:Evil" in message
        assert "trust_code=True" in message
        assert "--trust-code" in message
        assert "\n" not in message
    assert not (evil / "it-ran").exists()


def test_trusted_code_is_imported(weights: Path, evil: Path):
    assert (
        fm_core.load(weights, device="cpu", trust_code=True).sample(2, solver="euler", steps=1).shape[0] == 2
    )
    assert (evil / "it-ran").exists()


def test_code_that_a_run_s_own_configuration_names_is_imported(tmp_path: Path, evil: Path, weights: Path):
    own = config_at(tmp_path).model_dump(mode="json")
    own["method"]["path"] = "evil_paths:Evil"
    config = RunConfig.model_validate(own)
    load_model(weights_file(config, 7), CPU, config)
    (config_path(config) / "config.yaml").write_text(dump_yaml(config))
    fm_core.load(config_path(config), device="cpu")
    assert (evil / "it-ran").exists()


def test_the_command_line_names_and_accepts_the_switch(tmp_path: Path, weights: Path, evil: Path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config_at(tmp_path)))
    command = ["export", "--config", str(file), "--sample.weights", str(weights)]
    assert main(command) == 2
    assert "--trust-code" in capsys.readouterr().err
    assert not (evil / "it-ran").exists()
    main([*command, "--trust-code", "--export.folder", str(tmp_path / "exported")])
    assert (evil / "it-ran").exists()


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Number of calls of each kind to a store in memory."""
    counts: Counter[str] = Counter()

    def counted(name: str):
        stock = getattr(MemoryFileSystem, name)

        def call(self, *arguments, **options):
            counts[name] += 1
            return stock(self, *arguments, **options)

        return call

    for name in ("ls", "info", "cat_file", "put_file", "get_file", "rm_file", "_open"):
        monkeypatch.setattr(MemoryFileSystem, name, counted(name))
    return counts


def in_memory(folder: Path, batches: int) -> RunConfig:
    config = config_at(folder, images=batches, batch=1, steps=1, trajectories=0)
    section = config.sample.model_copy(update={"root": f"memory://{folder.name}"})
    return config.model_copy(update={"sample": section})


def requests_of(folder: Path, batches: int, requests: Counter[str], ranks: int = 2) -> int:
    folder.mkdir()
    config = in_memory(folder, batches)
    checkpoint(config)
    requests.clear()
    samples = make(config, ranks)
    total = requests.total()
    assert len(samples.finished()) == batches
    return total


def test_requests_to_a_store_grow_with_the_number_of_batches(
    tmp_path: Path, requests: Counter[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fm_core.sampling.sample_worker.REPORT_SHARE", 1e9)  # a report after every batch
    few, many = requests_of(tmp_path / "few", 10, requests), requests_of(tmp_path / "many", 40, requests)
    assert many <= 4.2 * few
    assert many <= 40 * 20


def test_a_resumed_job_reads_only_the_sidecars_of_its_own_batches(tmp_path: Path, requests: Counter[str]):
    config = in_memory(tmp_path, 20)
    checkpoint(config)
    make(config)
    requests.clear()
    make(config, ranks=20)
    assert requests["ls"] <= 20 + 2  # one per rank, and the reports of rank 0
    assert requests["put_file"] == 0
