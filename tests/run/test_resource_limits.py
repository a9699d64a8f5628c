"""Cores, open files and out-of-memory kills, as the kernel tells them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fm_core.run import resource_limits
from fm_core.run.resource_limits import OomCounter, available_cores
from tests.support import ROOT


def kernel(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Folders that look like /proc and /sys/fs/cgroup."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc", folder / "cgroup"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, 6),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "100000 100000\n"}, 1),  # docker run --cpus 1
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/cpu.max": "250000 100000\n",
                "cgroup/a/b/cpu.max": "max 1",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/elsewhere\n", "cgroup/cpu.max": "5000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "9900000 100000\n"}, 6),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n0::/\n",
                "cgroup/cpu/job/cpu.cfs_quota_us": "200000\n",
                "cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "cgroup/cpu/cpu.cfs_quota_us": "-1",
                "cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            6,
        ),
    ],
)
def test_cores_are_those_of_the_affinity_mask_within_the_quota(tmp_path, monkeypatch, files, cores: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert available_cores(*kernel(tmp_path, files)) == cores


def test_a_process_bound_to_one_core_has_one():
    code = "from fm_core.run.resource_limits import available_cores; print(available_cores())"
    bound = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {code}"
    done = subprocess.run([sys.executable, "-c", bound], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one(monkeypatch):
    limits = [(256, 5_000)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))
    assert resource_limits.raise_open_file_limit() == 5_000
    assert limits[1:] == [(5_000, 5_000)]
    assert resource_limits.raise_open_file_limit() == 5_000
    assert len(limits) == 2


@pytest.mark.parametrize(
    ("counter", "cgroup"),
    [
        ("proc/vmstat", ""),
        ("cgroup/memory.events", "0::/\n"),
        ("cgroup/memory/job/memory.oom_control", "4:memory:/job\n"),
    ],
)
def test_processes_that_the_kernel_killed_for_lack_of_memory_are_counted(tmp_path, counter: str, cgroup: str):
    places = kernel(tmp_path, {counter: "low 7\noom_kill 3\n", "proc/self/cgroup": cgroup})
    oom_counter = OomCounter(*places)
    assert oom_counter.new_kills() == 0
    (tmp_path / counter).write_text("low 9\noom_kill 5\n")
    assert oom_counter.new_kills() == 2


def test_without_counters_nothing_is_counted(tmp_path):
    assert OomCounter(tmp_path, tmp_path).new_kills() == 0
