"""Each benchmark runs with its smallest settings on a CPU, prints its ratios and writes its JSON."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "infra" / "benchmarks"
STEP = ("--batch", "2", "--warmup", "1", "--steps", "1", "--blocks", "1")
COMMANDS = {
    "training_step": ("--device", "cpu", "--size", "digits", *STEP, "--only", "ours-eager", "reference"),
    "sampling": (
        *("--device", "cpu", "--size", "small", "--batch", "1", "--blocks", "1"),
        *("--only", "ours-midpoint-20", "odesolver-midpoint-20"),
    ),
    "end_to_end": ("--device", "cpu", "--size", "small", "--images", "64", *STEP),
    "engine_overhead": (*STEP, "--only", "zero-1", "ddp"),
    "cpu_step": (*STEP, "--only", "ours", "torchcfm"),
    "moments": ("--images", "200", "--features", "16", "--only", "evaluate", "pytorch-fid"),
    "keyed_noise": ("--task", "normals", "--images", "1", *STEP, "--only", "philox-v1", "numpy-v1"),
    "solver_arithmetic": ("--batch", "2", "--blocks", "1", "--only", "network", "unipc"),
    "solvers": (
        *("--device", "cpu", "--size", "8", "--channels", "8", "--batch", "1", "--blocks", "1"),
        *("--only", "ours-euler", "torchcfm-euler"),
    ),
}
TABLES = {
    "sampling": "-midpoint-20",
    "engine_overhead": "-1",
    "cpu_step": "-ours",
    "moments": "-evaluate",
    "keyed_noise": "-normals",
    "solvers": "-euler",
}
"""Suffix in the name of the JSON file."""
MODULES = {
    *("data_peers", "data_tasks", "gpu_parts", "interleaved", "kernel_moments", "peers", "program"),
    *("same_work", "torchcfm_run"),
}
OWN_TEST = {"start_up"}
NOT_TESTED = {"data", "gpu", "parity", "roofline", "score_errors"}
"""Benchmarks that are not tested here: data downloads peers of a hundred megabytes, parity needs a trained
run (see the tests of reproduce), and the others have their own test modules."""


def test_every_benchmark_is_listed():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == {*COMMANDS} | MODULES | OWN_TEST | NOT_TESTED


@pytest.fixture
def benchmark(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Function that runs a benchmark's script in an empty folder, with no GPU visible."""

    def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, BENCHMARKS / f"{name}.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_its_ratio_and_writes_its_measurements(benchmark, name, tmp_path):
    done = benchmark(name, "--rounds", "1", "--json", tmp_path / "results.json", *COMMANDS[name])
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / f"results{TABLES.get(name, '')}.json").read_text())
    assert {"command", "machine", "contenders"} <= record.keys()
    assert len(record["found"]) == 2
    assert all(row["seconds"] > 0 for (row,) in record["found"].values())
    (table,) = done.stdout.split("time against | ratio |")[1:]
    assert re.search(r"^\| \S+: .* \| \d+\.\d\d \| \d+\.\d\d, \d+\.\d\d \|", table, re.MULTILINE)


def test_stated_errors_are_compared_with_the_true_deviation(benchmark, tmp_path):
    settings = ("--images", "650", "--repetitions", "3", "--scores", "frechet", "--kinds", "gaussian")
    done = benchmark("score_errors", *settings, "--file", tmp_path / "errors.jsonl")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gaussian" in done.stdout
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) >= 6  # two cases


@pytest.mark.parametrize("name", ["training_step", "sampling", "end_to_end", "solvers", "gpu"])
def test_a_gpu_benchmark_without_a_gpu_is_refused(benchmark, name):
    done = benchmark(name)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{name}\.py: no GPU here; for a small run: --device cpu .*\n", done.stderr)


def test_start_up_measures_each_command_in_both_checkouts(benchmark, tmp_path):
    """The earlier checkout is a copy whose commands record that they ran."""
    file, checkout = tmp_path / "results.json", tmp_path / "earlier"
    shutil.copytree(BENCHMARKS.parents[1] / "fm_core", checkout / "fm_core")
    main = checkout / "fm_core" / "__main__.py"
    record = f"open({str(tmp_path / 'ran')!r}, 'a').write(sys.argv[1] + '\\n')"
    main.write_text(f"import sys\n{record}\n{main.read_text()}")
    done = benchmark("start_up", checkout, "--rounds", "1", "--without-prefect", "--json", file)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(file.read_text())
    assert list(measured) == ["fm --help", "fm status", "fm validate --quick", "fm train, to its first step"]
    for samples in measured.values():
        assert all(elapsed > 0 and cpu > 0 for each in samples.values() for elapsed, cpu in each)
        assert samples.keys() == {"here", "earlier"}
    assert len(done.stdout.strip().splitlines()) == 2 + len(measured)
    ran = (tmp_path / "ran").read_text().split()
    assert ran == ["shard", *(name for name in ("--help", "status", "validate", "train") for _ in range(2))]
