"""A short chaos test: the disturbed run equals the undisturbed one, and its record can be continued."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.chaos_faults.campaign import ChaosCampaign
from tests.support import ROOT

SEED, IMAGES = 3, 480
QUICK = ("kill", "freeze", "unmount", "full disk", "error of a system call", "clock step", "stop request")


def chaos(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "infra" / "chaos.py", "--directory", directory, "--seed", SEED]
    command += ["--images", IMAGES, "--minutes", 20, "--episodes", 1, "--only", *QUICK, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=directory)


@pytest.fixture(scope="module")
def chaos_run(tmp_path_factory):
    """A campaign of one short episode."""
    directory = tmp_path_factory.mktemp("chaos")
    return directory, chaos(directory, "--at-least", 0)


def test_a_disturbed_run_equals_the_undisturbed_one(chaos_run):
    directory, done = chaos_run
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((directory / "results.json").read_text())
    assert sum(record["faults"].values()) >= 1
    assert [episode["violations"] for episode in record["episodes"]] == [[]]
    assert all(episode["checkpoints_completed"] for episode in record["episodes"])
    assert "every run equals the undisturbed one bit for bit" in done.stdout


def test_a_campaign_that_has_ended_only_reports_and_fails_without_enough_faults(chaos_run):
    directory, _ = chaos_run
    before = (directory / "results.json").read_text()
    again = chaos(directory, "--at-least", 50)
    assert again.returncode == 1, again.stderr
    assert "occurred" in again.stdout
    assert "not 50" in again.stdout
    assert (directory / "results.json").read_text() == before


def test_the_record_of_another_seed_is_refused(tmp_path):
    ChaosCampaign(tmp_path, 1, 1.0, IMAGES)._save()
    with pytest.raises(ValueError, match="another seed or size"):
        ChaosCampaign(tmp_path, 2, 1.0, IMAGES)


def test_two_campaigns_do_not_share_a_directory(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another chaos test runs in"):
            ChaosCampaign(tmp_path, 1, 1.0, IMAGES).run()


def test_the_deck_begins_with_what_occurred_least(tmp_path):
    campaign = ChaosCampaign(tmp_path, 1, 1.0, IMAGES)
    campaign.allowed = {"mounts", "network", "hosts", "compiler", "store"}
    campaign.record["faults"] = {kind.name: 3 for kind in campaign.kinds} | {"kill: rank 0": 1}
    deck = []
    assert campaign._draw(deck, "folder").name == "kill: rank 0"
    assert not {kind.name for kind in deck} & {"store stopped", "network cut: store"}
    campaign.allowed = set()
    assert set(campaign.not_run) >= {
        "unmount: checkpoints",
        "clock step",
        "store stopped",
        "network cut: ranks",
    }
    assert all(reason for reason in campaign.not_run.values())
    assert "not run: no C compiler" in campaign.table(0)


def test_kinds_are_chosen_by_their_names(tmp_path):
    campaign = ChaosCampaign(tmp_path, 1, 1.0, IMAGES, ["kill", "freeze"])
    assert {name for name in campaign.only if not name.startswith("kill: ")} == {"freeze"}
    assert campaign.not_run["second start"] == "not chosen"
    with pytest.raises(ValueError, match="none of kill: supervisor"):
        ChaosCampaign(tmp_path, 1, 1.0, IMAGES, ["chill"])
