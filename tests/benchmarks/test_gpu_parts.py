"""infra/benchmarks/gpu.sh without a GPU: parts, failures, the time limit, the JSON and the table."""

import importlib
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from infra.benchmarks.peers import PACKAGES
from tests.support import ROOT

FOLDER = ROOT / "infra" / "benchmarks"
RESULT = 'print(\'{"seconds": 0.5, "images_per_s": 128.0, "mfu": 0.4, "peak_bytes": 2000000000}\')'
FACTS = {
    "commit": "0123456789ab",
    "device": "cuda",
    "machine": {"devices": ["NVIDIA H200"], "versions": {"torch": "2.13.0"}},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module infra/benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gpu")


@pytest.fixture
def record(gpu, tmp_path: Path) -> dict[str, Any]:
    """JSON and table from gpu.py for parts that are measured, fail, hang until stopped, or are skipped."""
    scripts = {
        "reference": RESULT,
        "broken": "def f():\n    raise RuntimeError('CUDA error: misaligned address')\nf()",
        "hanging": "import time\ntime.sleep(600)",
        "long": RESULT,
        "ours": RESULT.replace("0.5", "0.2"),
    }
    seconds = {"hanging": 0.1, "long": 1e6}
    parts = []
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
        script = str(tmp_path / f"{name}.py")
        expected = seconds.get(name, 120)
        parts.append(gpu.Part("unet", name, name, script, {}, expected, name == "reference", goal="40%"))
    rows = gpu.run(parts, FACTS, tmp_path / "new" / "gpu.json", time.monotonic() + 1000, 1)
    content = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert content["rows"] == rows
    return {**content, "table": gpu.table(parts, rows, FACTS), "parts": parts}


def test_a_part_that_fails_or_hangs_says_why_and_the_others_go_on(record):
    rows = {row["name"]: (row["state"], row["why"]) for row in record["rows"]}
    assert rows == {
        "reference": ("measured", ""),
        "broken": ("failed", "RuntimeError: CUDA error: misaligned address"),
        "hanging": ("failed", "stopped after 0 s"),
        "long": ("skipped", rows["long"][1]),
        "ours": ("measured", ""),
    }
    assert re.fullmatch(r"1e\+06 s expected, \d+ s left", rows["long"][1])
    assert record["rows"][0]["result"]["seconds"] == 0.5


def test_the_table_has_a_row_for_each_part_with_its_ratio_or_reason(record):
    lines = record["table"].splitlines()
    assert "| unet/ours | ours | 0.2 | 0.40 | 128 | 40.0% | 2.0 | 40% |  |" in lines
    assert "| unet/reference | reference | 0.5 |  | 128 | 40.0% | 2.0 | 40% |  |" in lines
    assert "failed: RuntimeError: CUDA error: misaligned address |" in record["table"]
    assert lines[-1] == "Measured on: NVIDIA H200; torch 2.13.0; commit 0123456789ab."
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert len(columns) == 1


def test_a_second_call_keeps_what_the_first_measured(gpu, record, tmp_path):
    path = tmp_path / "new" / "gpu.json"
    earlier = gpu.measured(path, FACTS)
    assert earlier.keys() == {"unet/reference", "unet/ours"}
    assert gpu.measured(path, {**FACTS, "commit": "other"}) == {}
    assert gpu.measured(tmp_path / "none.json", FACTS) == {}
    for name in ("reference", "ours"):
        (tmp_path / f"{name}.py").unlink()
    parts = [part for part in record["parts"] if part.key in earlier]
    rows = gpu.run(parts, FACTS, path, time.monotonic(), 1, earlier)
    assert [row["state"] for row in rows] == ["measured", "measured"]


def test_a_part_for_gpus_is_skipped_on_a_cpu(gpu):
    part = gpu.Part("unet", "ours", "", "none.py", needs_gpu=True)
    row = gpu.run_part(part, "cpu", time.monotonic() + 1000, 1)
    assert (row["state"], row["why"]) == ("skipped", "needs a GPU")


def test_losses_are_compared_with_those_of_the_cpu(gpu):
    assert gpu.loss_difference([1.0, 2.0], [1.0, 2.0]) == 0
    assert gpu.loss_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    for losses in ([1.0], [1.0, None], [1.0, float("nan")]):
        assert gpu.loss_difference(losses, [1.0, 2.0]) == float("inf")
    row = {"group": "losses", "name": "fp32", "reference": False, "result": {"losses": [1.0005]}}
    assert gpu.remark(row, {"losses": [1.0]}) == "differs by 5.0e-04: within the tolerance"
    row["result"] = {"losses": [1.1]}
    assert "OUTSIDE" in gpu.remark(row, {"losses": [1.0]})


def test_the_table_replaces_the_one_between_the_markers_of_the_page(gpu, tmp_path):
    page = tmp_path / "benchmarks.md"
    before = gpu.PAGE.read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    for text in ("| first |", "| second |"):
        gpu.write_table(page, text)
    begin, end = gpu.MARKERS
    after = page.read_text(encoding="utf-8")
    assert after.split(begin)[0] == before.split(begin)[0]
    assert after.split(end)[1] == before.split(end)[1]
    assert after.split(begin)[1].split(end)[0] == "\n\n| second |\n\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"the markers .* are missing"):
        gpu.write_table(page, "")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_parts_name_programs_and_sizes_that_exist(gpu, device, size):
    sizes = importlib.import_module("same_work").SIZES
    parts = gpu.all_parts(device, size)
    assert len({part.key for part in parts}) == len(parts)
    assert all((FOLDER / part.script).is_file() for part in parts)
    assert {part.task["size"] for part in parts if part.group != "noise"} <= sizes.keys()
    groups = {part.group for part in parts} - {"loader"}
    assert all(sum(part.reference for part in parts if part.group == group) == 1 for group in groups)
    assert [part.seconds for part in parts] == sorted(part.seconds for part in parts)
    assert sum(part.seconds for part in parts) <= 480


def fake_python(tmp_path: Path) -> Path:
    """Interpreter that records its arguments instead of running them."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 3.12 && exit\necho "$@" >>{tmp_path}/calls\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("option", "count"), [((), 3), (("--no-torch",), 2)])
def test_the_wheels_are_the_versions_of_the_constraints(tmp_path, option, count):
    environment = {**os.environ, "PYTHON": str(fake_python(tmp_path))}
    command = ["bash", FOLDER / "wheels.sh", tmp_path / "wheels", *option]
    subprocess.run(command, check=True, env=environment, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == count
    pinned = {line.split("==")[0] for line in (ROOT / "infra/constraints.txt").read_text().splitlines()}
    words = calls[0].split(f"--dest {tmp_path}/wheels ")[1].split()
    names = [word for word in words if word not in PACKAGES]
    assert {*names, "deepspeed", "torch"} <= pinned
    assert {*PACKAGES} <= {*words}
    assert all(f"--constraint {ROOT}/infra/constraints.txt" in call for call in calls)
    assert "--python-version 3.12" in calls[0]
    assert calls[1].endswith(" deepspeed")
    assert [call.endswith(" torch") for call in calls] == [False, False, True][:count]


def test_a_folder_without_wheels_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        command = ["bash", FOLDER / "gpu.sh", "--wheels", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"gpu.sh: --wheels {folder}: no ")


def test_small_settings_run_on_a_cpu(public_python, tmp_path):
    """Run the programs that gpu.sh starts with the interpreter's own packages."""
    parts = [
        *("noise/philox-v1", "noise/philox-v1-compiled", "losses/cpu", "losses/fp32", "loader"),
        *(
            "dit/no-switch",
            "dit/compile-only",
            "unet/reference",
            "sampling-midpoint-20/odesolver",
            "cuda-graphs",
        ),
    ]
    command = ["bash", FOLDER / "gpu.sh", "--device", "cpu", "--size", "tiny", "--limit", "900"]
    command += ["--json", tmp_path / "gpu.json", "--part", *parts]
    environment = {**os.environ, "PYTHON": str(public_python), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    states = {row["part"]: row["state"] for row in rows}
    assert {name for name, state in states.items() if state != "measured"} == {
        *("noise/philox-v1-compiled", "dit/compile-only", "cuda-graphs/on", "cuda-graphs/off")
    }
    assert "differs by 0.0e+00: within the tolerance" in done.stdout
    assert "waits " in done.stdout


def test_without_a_gpu_nothing_is_measured_on_the_page(gpu):
    between = gpu.PAGE.read_text(encoding="utf-8").split(gpu.MARKERS[0])[1].split(gpu.MARKERS[1])[0]
    assert "Nothing was measured on a GPU" in between or "Measured on: NVIDIA" in between
