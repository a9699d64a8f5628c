"""Cluster check on made-up facts of all hosts; tests/cluster runs it on two real hosts."""

import pytest

from fm_core.config import RunConfig
from fm_core.launch.cluster_check import assess, cluster_checks
from fm_core.launch.cluster_probe import _checkpoints
from fm_core.run.results import Check

SPEED = {"bytes": 2**24, "seconds": 0.02, "bytes_per_s": 8e8}


def rank(host, **other):
    facts = {"host": host, "versions": {"torch": "2.13.0", "fm_core": "abc"}, "device": "CPU", "devices": 2}
    facts |= {"scratch_bytes": 2**40, "data": True, "run_directory": True, "clock": 1000.0}
    facts["checkpoints"] = {"folder": "/r", "uploads": False, "there": 0, "free_bytes": 10 * 2**30}
    return {**facts, **other}


def checks_of(*ranks, **sections):
    checks = assess(RunConfig.model_validate(sections), list(ranks), SPEED)
    assert all("\n" not in check.detail for check in checks)
    return {check.name: check for check in checks}


def test_equal_hosts_pass():
    checks = checks_of(rank("a"), rank("a"), rank("b"), rank("b"))
    assert all(check.ok for check in checks.values())
    assert checks["launch"].detail == "4 processes met on a, b"
    assert checks["clocks"].detail == "0.000 s apart"
    assert checks["all-reduce"].detail == "16 MiB over 4 processes in 20.0 ms, 0.80 GB/s per process"


@pytest.mark.parametrize(
    ("other", "name", "detail"),
    [
        (
            {"versions": {"torch": "2.9.0", "fm_core": "abc"}},
            "versions",
            "torch is 2.13.0 on a and 2.9.0 on b",
        ),
        ({"versions": {"torch": "2.13.0"}}, "versions", "fm_core is abc on a and None on b"),
        ({"device": "A100"}, "devices", "a: 2 x CPU, b: 2 x A100; all hosts should have the same"),
        ({"devices": 0}, "devices", "fewer than processes on b"),
        ({"run_directory": False}, "run directory", "not visible on b; give train.checkpoint_root"),
        ({"data": False}, "data", "on b; run fm shard"),
        ({"scratch_bytes": 2**30}, "free scratch space", "b: 1 GiB; 2 GiB are needed"),
        ({"clock": 1060.5}, "clocks", "60.500 s apart; synchronize them with NTP"),
    ],
)
def test_a_host_that_differs_fails_by_name(other, name, detail):
    checks = checks_of(rank("a"), rank("b", **other))
    assert detail in checks[name].detail
    assert [check.name for check in checks.values() if not check.ok] == [name]


@pytest.mark.parametrize(
    ("keep", "place", "each", "ok", "detail"),
    [
        (3, {}, 2.5, True, "a: 10.0 GiB free for train.checkpoint_root at /r; 4 checkpoints of 2.50 GiB"),
        (3, {}, 2.6, False, "4 checkpoints of 2.60 GiB remain to be written"),
        (3, {"there": 3}, 9, True, "1 checkpoints of"),
        (3, {"there": 7}, 11, False, "1 checkpoints of"),  # there is always one more
        (3, {"uploads": True}, 5, True, "for train.checkpoint_staging at /r; 2 checkpoints of"),
        (3, {"uploads": True}, 5.1, False, "2 checkpoints of"),
    ],
)
def test_checkpoints_have_room_where_the_first_rank_writes_them(keep, place, each, ok, detail):
    first, other = rank("a"), rank("b")
    first["checkpoints"] |= place
    other["checkpoints"] |= {"free_bytes": 0}
    config = RunConfig.model_validate({"train": {"keep_checkpoints": keep}})
    checks = assess(config, [first, other], SPEED, checkpoint_bytes=int(each * 2**30))
    (check,) = [check for check in checks if check.name == "space for checkpoints"]
    assert (check.ok, detail in check.detail) == (ok, True), check.detail


def test_space_for_checkpoints_is_asked_where_they_are_staged(tmp_path):
    staging = tmp_path / "staging" / "below"
    (tmp_path / "run" / "train" / "checkpoints" / "step-00000001").mkdir(parents=True)
    sections = {"run": {"root": str(tmp_path), "name": "run"}}
    here = _checkpoints(RunConfig.model_validate(sections))
    assert (here["folder"], here["uploads"], here["there"]) == (
        str(tmp_path / "run" / "train" / "checkpoints"),
        False,
        1,
    )
    train = {"checkpoint_root": "s3://bucket/run", "checkpoint_staging": str(staging)}
    staged = _checkpoints(RunConfig.model_validate({**sections, "train": train}))
    assert (staged["folder"], staged["uploads"], staged["there"]) == (str(staging / "run"), True, 0)
    assert staged["free_bytes"] > 0


def test_a_host_without_the_run_directory_passes_where_checkpoints_go_elsewhere():
    checks = checks_of(
        rank("a"), rank("b", run_directory=False), train={"checkpoint_root": "s3://bucket/run"}
    )
    assert checks["run directory"].ok


@pytest.fixture
def checked_machine(tmp_path) -> list[Check]:
    """The checks of this machine, with a group of two processes."""
    sections = {"run": {"root": str(tmp_path / "runs")}, "data": {"root": str(tmp_path / "data")}}
    return cluster_checks(RunConfig.model_validate({**sections, "launch": {"processes": 2, "threads": 1}}))


def test_this_machine_passes_except_for_missing_data(tmp_path, checked_machine):
    assert [check.name for check in checked_machine if not check.ok] == ["data"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_missing_hostfile_is_a_failed_check_and_no_exception(tmp_path):
    launch = {"kind": "ssh", "hostfile": str(tmp_path / "none")}
    checks = cluster_checks(RunConfig.model_validate({"launch": launch}))
    assert [(check.name, check.ok) for check in checks] == [("hostfile", False)]
