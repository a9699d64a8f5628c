"""Tiers of the test suite: the default tests, and the extended ones that `infra/test.sh --all` adds.

A test belongs to the extended tier if it uses, directly or through another fixture, one that is named here.
"""

from collections import Counter
from collections.abc import Iterable

import pytest

_BY_NEED = {
    "the demo with its Prefect server and worker": (
        "demo",
        "imagenet_without_archives",
        "interrupted_demo",
        "small_disk",
    ),
    "a Prefect server and worker": ("served", "operator", "comparison_run", "own_images_run"),
    "a browser": ("window", "browser"),
    "PostgreSQL": ("postgres", "team"),
    "two hosts over ssh": ("pair", "ssh_attempts", "ssh_run", "stored_run"),
    "two nodes of Slurm": ("slurm_run",),
    "namespaces of the kernel": ("second_interface", "pid_namespace", "pid_namespaces", "mounted"),
    "public packages as peers": ("public_python", "public_environment"),
    "benchmarks": ("benchmark",),
    "a hub of models": ("model_hub",),
    "an object store": ("s3", "silent_store", "object_store", "run_in_a_store"),
    "jobs of several processes": (
        "job",
        "slow_disk",
        "failed_in_debugger",
        "stopped_run",
        "killed_sending",
        "local_run",
        "debugged_run",
        "sampled_by_a_job",
        "drawn_elsewhere",
        "forked_ranks",
        "scored_by_a_job",
        "swept_training",
        "swept_by_the_page",
        "killed_sweep",
        "extended_run",
        "online_eval_run",
        "trained_on_damage",
        "machine_report",
        "failed_rendezvous",
        "launch_report",
        "two_ranks",
        "other_ranks",
        "objective_results",
        "sharded_flow_maps",
        "speed_results",
        "rank_group",
        "checked_machine",
        "reading_processes",
        "sent_bytes",
        "step_counts",
        "chaos_run",
    ),
    "comparisons of objectives": (
        "failed_in_parallel",
        "stopped_in_parallel",
        "killed_comparison",
        "compared",
        "many_objectives",
    ),
    "networks trained to their end": ("trained_classifier",),
    "closed forms of every objective on every path": ("other_pair",),
    "compiled networks": ("compiled_network", "compiler"),
    "the training of the notebook": ("trained_notebook",),
}
EXTENDED = {name: need for need, names in _BY_NEED.items() for name in names}
"""Fixture -> what it stands for in the summary."""


def tier_of(fixtures: Iterable[str]) -> str | None:
    """What makes a test with these fixtures an extended one; None for a default test."""
    return next((EXTENDED[name] for name in EXTENDED if name in set(fixtures)), None)


def keep_default(items: list[pytest.Item]) -> Counter[str]:
    """Remove extended tests from the items, in place; return how many were removed for each reason."""
    reasons = [tier_of(getattr(item, "fixturenames", ())) for item in items]
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if reason is None]
    return Counter(reason for reason in reasons if reason is not None)


def summary(removed: dict[str, int]) -> str:
    """A line that says what the extended tier would add."""
    parts = ", ".join(f"{what} ({count})" for what, count in sorted(removed.items(), key=lambda x: -x[1]))
    return f"--all adds {sum(removed.values()):,} tests: {parts}"
