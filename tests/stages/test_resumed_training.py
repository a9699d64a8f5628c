"""A run that was stopped, signaled, killed and damaged has the results of an undisturbed run."""

import json
import socket

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fm_core.checkpoint.format import complete_steps, verify
from fm_core.launch.dispatch import processes_of, submitted
from fm_core.storage.atomic_files import read_json, read_lines
from tests.support.tiny_run import TinyRun, is_progress

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def troubled(tiny):
    """What happened, start by start, to a run with the data and the seed of the tiny one."""
    # Unlike the tiny run it measures no held-out loss: that must not move training.
    over = {"method": {"path": "tests.support.fault_injection:FaultyPath"}, "train": {"held_out_images": 0}}
    run = TinyRun(tiny.root, "troubled", over)
    checkpoints = run.path / "train" / "checkpoints"
    story = {"run": run, "checkpoints": checkpoints}

    def start(name, *arguments, **variables):
        called = run.fm("train", *arguments, **variables)
        logs = [(run.path / "logs" / f"train-{rank}.log").read_text() for rank in (0, 1)]
        lines = [line for line in called.err.splitlines() if not is_progress(line)]
        story[name] = {
            "code": called.code,
            "errors": lines,
            "steps": complete_steps(checkpoints),
            "folders": sorted(path.name for path in checkpoints.glob("step-*")),
            "lines": [line["step"] for line in read_lines(run.path / "train" / "metrics.jsonl")],
            "left": processes_of(submitted(run.path)),
            "log": logs[0],
        }

    # Each start counts its own micro-batches: one for each step and rank.
    start("stop", FAULT="0:stop:5")
    start("term", FAULT="1:SIGTERM:5")
    start("kill", "--launch.restarts", "0", FAULT="1:SIGKILL:6")
    damaged = checkpoints / "step-00000012" / "raw.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    # From step 10 to a kill in step 16, from step 12 to a kill in step 18, from step 16 to the end.
    start("end", "--launch.restart_seconds", "0.1", FAULT="1:SIGKILL:6")
    story["restarts"] = read_lines(run.path / "logs" / "restarts.jsonl")
    return story


def test_the_stop_file_ends_it_between_two_steps_with_status_3(troubled):
    stop = troubled["stop"]
    assert stop["code"] == 3
    assert stop["errors"] == ["fm: stopped at step 5 (80 images seen); run it again to continue"]
    assert stop["steps"] == [4, 5]
    assert stop["left"] == []


def test_a_signal_to_one_rank_ends_all_at_the_same_step(troubled):
    term = troubled["term"]
    assert term["code"] == 3
    assert term["errors"] == ["fm: stopped at step 10 (160 images seen); run it again to continue"]
    assert term["steps"] == [8, 10]
    assert term["left"] == []


def test_kill_of_a_rank_loses_nothing_complete(troubled):
    kill = troubled["kill"]
    assert kill["code"] == 1
    assert len(kill["errors"]) == 1
    assert f"rank 1 on {socket.gethostname()} was killed" in kill["errors"][0]
    assert kill["steps"] == [10, 12]
    assert kill["lines"] == [3, 6, 9, 12, 15]
    assert kill["left"] == []


def test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_loaded(troubled):
    end = troubled["end"]
    assert end["code"] == 0
    assert "step-00000012/raw.safetensors differs from its SHA-256; trying an older" in end["log"]
    assert end["left"] == []


def test_a_killed_rank_is_named_and_the_job_starts_again_by_itself(troubled):
    records = troubled["restarts"]
    assert [(record["restart"], record["of"]) for record in records] == [(1, 3), (1, 3)]
    # A newer checkpoint lies between them, which begins the count anew.
    for record in records:
        assert f"rank 1 on {socket.gethostname()} was killed" in record["because"]


def test_only_the_newest_checkpoints_stay_and_they_are_complete(troubled):
    assert troubled["end"]["folders"] == ["step-00000016", "step-00000020"]
    for name in troubled["end"]["folders"]:
        assert verify(troubled["checkpoints"] / name) is None
    done = read_json(troubled["run"].path / "train" / "DONE.json")
    assert (done["checkpoint"], done["images_seen"], done["step"]) == ("step-00000020", 320, 20)


def test_its_losses_are_those_of_the_run_left_alone_to_the_bit(tiny, troubled):
    ours, theirs = (read_lines(run.path / "train" / "metrics.jsonl") for run in (troubled["run"], tiny))
    assert [line["step"] for line in ours] == [3, 6, 9, 12, 15, 18, 20]
    measured = {"images_per_s", "seconds", "data_seconds", "memory_bytes", "tflops_per_device"}
    for one, other in zip(ours, theirs, strict=True):
        assert {key: one[key] for key in one.keys() - measured} == {
            key: other[key] for key in other.keys() - measured
        }
    assert len({line["loss"] for line in ours}) == len(ours)


@pytest.mark.parametrize("name", ["raw", "ema-0.9", "ema-0.5"])
def test_its_weights_are_those_of_the_run_left_alone_to_the_bit(tiny, troubled, name):
    place = f"train/checkpoints/step-00000020/{name}.safetensors"
    ours, theirs = (load_file(run.path / place) for run in (troubled["run"], tiny))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(weight.abs().max() > 0 for weight in ours.values())


def test_averages_differ_from_the_weights_and_from_each_other(troubled):
    folder = troubled["checkpoints"] / "step-00000020"
    files = [load_file(folder / f"{name}.safetensors") for name in ("raw", "ema-0.9", "ema-0.5")]
    key = max(files[0], key=lambda name: files[0][name].abs().max())
    assert len({file[key].sum().item() for file in files}) == 3


def test_a_file_of_weights_says_what_it_belongs_to(troubled):
    with safe_open(troubled["checkpoints"] / "step-00000020" / "ema-0.9.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe["model"]["channels"] == 8
    assert recipe["method"]["path"] == "tests.support.fault_injection:FaultyPath"
    assert (recipe["levels"], recipe["image_shape"], recipe["classes"]) == (17, [1, 8, 8], 10)
    assert (recipe["step"], recipe["images_seen"]) == (20, 320)
    assert len(recipe["data"]["version"]) == 64
