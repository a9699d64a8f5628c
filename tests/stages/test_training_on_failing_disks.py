"""Training whose disks are unmounted, mounted again, and full, in a mount namespace of its own."""

import json
import os
import subprocess
import sys

import pytest

from fm_core.checkpoint.format import complete_steps
from tests.support import ROOT
from tests.support.tiny_run import TinyRun


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    """What tests/support/mounted_training.py went through."""
    command = ["unshare", "--mount", "--map-root-user"] if os.getuid() else ["unshare", "--mount"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    folder = tmp_path_factory.mktemp("mounted")
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.support.mounted_training", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads((folder / "results.json").read_text()), "stderr": done.stderr}


@pytest.fixture
def slow_disk(tiny):
    """A run whose fsync takes a second each time, and the outcome of its training."""
    over = {
        "method": {"path": "tests.support.fault_injection:FaultyPath"},
        "train": {"hang_seconds": 5.0, "images": 64, "schedule": "constant", "checkpoint_images": 64},
    }
    run = TinyRun(tiny.root, "slow-disk", over)
    return run, run.fm("train", "--launch.restarts", "0", FAULT="0:slow:2")


def test_a_save_that_makes_progress_is_not_a_hang_however_long_it_takes(slow_disk):
    """A checkpoint needs a dozen of them, and five seconds without progress are a hang."""
    run, done = slow_disk
    assert done.code == 0, done.err
    assert complete_steps(run.path / "train" / "checkpoints") == [4]


def test_a_run_whose_disk_is_unavailable_does_not_begin_again(mounted):
    first, away = mounted["unmounted"]["first"], mounted["unmounted"]["away"]
    assert first["outcome"] == "done"
    assert away["outcome"] == "UnreachableError"
    assert "this run has completed step-00000010 in " in away["message"]
    assert "check that the disk is mounted" in away["message"]
    assert "\n" not in away["message"]
    assert (away["lines"], away["validation"]) == (first["lines"], first["validation"])
    assert mounted["unmounted"]["left"] == []


def test_a_disk_that_is_unavailable_while_training_costs_one_checkpoint(mounted):
    blinked = mounted["unmounted"]["blinked"]
    assert blinked["outcome"] == "done", blinked["message"]
    assert blinked["steps"][-2:] == [16, 20]
    # Nothing was written to the empty mount point.
    assert mounted["unmounted"]["below"] == []
    assert "OWNER.json is missing from" in mounted["stderr"]


def test_its_metrics_are_those_of_an_undisturbed_run(mounted):
    for key in ("lines", "losses"):
        assert mounted["unmounted"]["blinked"][key] == mounted["reference"][key]


def test_a_full_disk_of_checkpoints_costs_one_checkpoint(mounted):
    assert mounted["full"]["outcome"] == "done", mounted["full"]["message"]
    assert mounted["full"]["steps"][-2:] == [8, 10]
    assert "No space left on device" in mounted["stderr"]
    assert mounted["full"]["losses"] == mounted["reference"]["losses"][:10]


def test_a_run_without_a_checkpoint_begins_again_and_keeps_its_metrics(mounted):
    history = mounted["history"]
    assert history["died"]["lines"] == [1, 2]
    assert history["first"]["outcome"] == "done"
    assert history["first"]["losses"] == mounted["reference"]["losses"][:10]
    assert history["set aside"][:2] == [1, 2]


@pytest.mark.parametrize("which", ["gone", "gone, of an earlier version"])
def test_a_run_that_had_a_checkpoint_does_not_begin_again(mounted, which):
    gone = mounted["history"][which]
    assert gone["outcome"] == "UnreachableError"
    assert "this run has completed step-00000010" in gone["message"]
    assert "train.start_over true" in gone["message"]
    assert gone["lines"] == list(range(1, 11))


def test_start_over_begins_at_step_0_once_and_deletes_nothing(mounted):
    history = mounted["history"]
    assert history["over"]["outcome"] == "StopRequested"
    assert history["over"]["lines"][0] == 1
    assert history["on"]["lines"] == list(range(1, 11))
    assert history["on"]["losses"] == mounted["reference"]["losses"][:10]
    assert (history["again"]["outcome"], history["again"]["message"]) == ("done", "verified")
    aside = [name for name in history["checkpoints"] if name.startswith("set-aside-")]
    assert [name.split(".")[0] for name in aside] == ["set-aside-step-00000008", "set-aside-step-00000010"]
    assert "DONE.set-aside-1.json" in history["names"]
    assert "metrics.set-aside.jsonl" in history["names"]


def test_another_run_with_the_same_place_is_refused(mounted):
    story = mounted["two runs"]
    assert story["a"]["outcome"] == "done"
    assert story["b"]["outcome"] == "ForeignCheckpointsError"
    assert "another run, a" in story["b"]["message"]
    assert "choose another train.checkpoint_root" in story["b"]["message"]
    assert story["b"]["steps"] == story["a"]["steps"]
    assert "run.name was 'a' and is now 'b'" in story["sampled"]


def test_a_full_run_directory_costs_no_line_of_metrics(mounted):
    assert mounted["full-run"]["outcome"] == "done", mounted["full-run"]["message"]
    assert mounted["full-run"]["lines"] == list(range(1, 11))
    assert mounted["full-run"]["losses"] == mounted["reference"]["losses"][:10]
    assert mounted["full-run"]["status"]["phase"] == "done"
