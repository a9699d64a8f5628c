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
from tests.support.forked_ranks import forked_jobs
from tests.support.tiny_run import TinyRun, is_progress

MEASURED = {"images_per_s", "seconds", "data_seconds", "memory_bytes", "tflops_per_device"}


class Training:
    """A run with the data and the seed of the tiny one, and what happened to it, start by start."""

    def __init__(self, tiny: TinyRun, name: str) -> None:
        # Unlike the tiny run it measures no validation loss, which must not affect training.
        path = {"path": "tests.support.fault_injection:FaultyPath"}
        self.run = TinyRun(tiny.root, name, {"method": path, "train": {"validation_images": 0}})
        self.checkpoints = self.run.path / "train" / "checkpoints"

    def start(self, *arguments: str, **variables: str) -> dict:
        called = self.run.fm("train", *arguments, **variables)
        log = self.run.path / "logs" / "train-0.log"
        return {
            "code": called.code,
            "errors": [line for line in called.err.splitlines() if not is_progress(line)],
            "steps": complete_steps(self.checkpoints),
            "lines": [line["step"] for line in metrics(self.run)],
            "left": processes_of(submitted(self.run.path)),
            "log": log.read_text() if log.exists() else "",
        }


def metrics(run: TinyRun) -> list[dict]:
    """Lines of the metrics file, without what depends on the machine."""
    lines = read_lines(run.path / "train" / "metrics.jsonl")
    return [{key: line[key] for key in line.keys() - MEASURED} for line in lines]


@pytest.fixture(scope="module")
def killed_run(tiny) -> dict:
    """Two ranks; one damages the newest checkpoint and is killed in step 18; the job restarts."""
    training = Training(tiny, "killed")
    with forked_jobs():
        end = training.start("--launch.restart_seconds", "0.1", FAULT="1:damage:18")
    return {"training": training, "checkpoints": training.checkpoints, "end": end}


@pytest.fixture(scope="module")
def killed_sending(tiny) -> tuple[Training, dict, dict]:
    """Rank 1 is killed when it sends its first piece of the checkpoint of step 12; then the next start."""
    training = Training(tiny, "killed-sending")
    with forked_jobs():
        killed = training.start("--launch.restarts", "0", FAULT="1:sending:9")
        return training, killed, training.start()


@pytest.fixture(scope="module")
def stopped_run(tiny) -> dict:
    """A run that a STOP file stops, then a signal to one rank, and that a kill ends permanently."""
    training = Training(tiny, "stopped-twice")
    # Each start counts its own micro-batches: one for each step and rank.
    return {
        "training": training,
        "stop": training.start(FAULT="0:stop:5"),
        "term": training.start(FAULT="1:SIGTERM:5"),
        "kill": training.start("--launch.restarts", "0", FAULT="1:SIGKILL:6"),
    }


def test_the_stop_file_ends_it_between_two_steps_with_status_3(stopped_run):
    stop = stopped_run["stop"]
    assert stop["code"] == 3
    assert stop["errors"] == ["fm: stopped at step 5 (80 images seen); run it again to continue"]
    assert stop["steps"] == [4, 5]
    assert stop["left"] == []


def test_a_signal_to_one_rank_ends_all_at_the_same_step(stopped_run):
    term = stopped_run["term"]
    assert term["code"] == 3
    assert term["errors"] == ["fm: stopped at step 10 (160 images seen); run it again to continue"]
    assert term["steps"] == [8, 10]
    assert term["left"] == []


def test_kill_of_a_rank_loses_nothing_complete(stopped_run):
    kill = stopped_run["kill"]
    assert kill["code"] == 1
    assert len(kill["errors"]) == 1
    assert f"rank 1 on {socket.gethostname()} was killed" in kill["errors"][0]
    assert kill["steps"] == [10, 12]
    assert kill["lines"] == [3, 6, 9, 12, 15]
    assert kill["left"] == []


def test_losses_of_a_stopped_run_are_those_of_the_undisturbed_run_to_the_bit(tiny, stopped_run):
    expected = [line for line in metrics(tiny) if line["step"] <= 15]
    assert metrics(stopped_run["training"].run) == expected


def test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_loaded(killed_run):
    end = killed_run["end"]
    assert end["code"] == 0, end["errors"]
    assert "step-00000016/raw.safetensors differs from its SHA-256; trying an older" in end["log"]
    assert end["left"] == []


def test_a_rank_killed_while_it_sends_leaves_the_checkpoint_before_and_the_run_goes_on(tiny, killed_sending):
    training, killed, after = killed_sending
    assert killed["code"] == 1
    assert f"rank 1 on {socket.gethostname()} was killed" in killed["errors"][0]
    assert killed["steps"] == [4, 8]
    assert after["code"] == 0
    assert metrics(training.run) == metrics(tiny)


def test_a_killed_rank_is_named_and_the_job_is_restarted_automatically(killed_run):
    (record,) = read_lines(killed_run["training"].run.path / "logs" / "restarts.jsonl")
    assert (record["restart"], record["of"]) == (1, 3)
    assert f"rank 1 on {socket.gethostname()} was killed" in record["because"]


def test_only_the_newest_checkpoints_stay_and_they_are_complete(killed_run):
    folders = sorted(path.name for path in killed_run["checkpoints"].glob("step-*"))
    assert folders == ["step-00000016", "step-00000020"]
    for name in folders:
        assert verify(killed_run["checkpoints"] / name) is None
    done = read_json(killed_run["training"].run.path / "train" / "DONE.json")
    assert (done["checkpoint"], done["images_seen"], done["step"]) == ("step-00000020", 320, 20)


def test_its_losses_are_those_of_the_undisturbed_run_to_the_bit(tiny, killed_run):
    ours = metrics(killed_run["training"].run)
    assert [line["step"] for line in ours] == [3, 6, 9, 12, 15, 18, 20]
    assert ours == metrics(tiny)
    assert len({line["loss"] for line in ours}) == len(ours)


@pytest.mark.parametrize("name", ["raw", "ema-0.9", "ema-0.5"])
def test_its_weights_are_those_of_the_undisturbed_run_to_the_bit(tiny, killed_run, name):
    place = f"step-00000020/{name}.safetensors"
    folders = (killed_run["checkpoints"], tiny.path / "train" / "checkpoints")
    ours, theirs = (load_file(folder / place) for folder in folders)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(weight.abs().max() > 0 for weight in ours.values())


def test_averages_differ_from_the_weights_and_from_each_other(killed_run):
    folder = killed_run["checkpoints"] / "step-00000020"
    files = [load_file(folder / f"{name}.safetensors") for name in ("raw", "ema-0.9", "ema-0.5")]
    key = max(files[0], key=lambda name: files[0][name].abs().max())
    assert len({file[key].sum().item() for file in files}) == 3


def test_a_weights_file_records_its_recipe(killed_run):
    with safe_open(killed_run["checkpoints"] / "step-00000020" / "ema-0.9.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe["model"]["channels"] == 8
    assert recipe["method"]["path"] == "tests.support.fault_injection:FaultyPath"
    assert (recipe["levels"], recipe["image_shape"], recipe["classes"]) == (17, [1, 8, 8], 10)
    assert (recipe["step"], recipe["images_seen"]) == (20, 320)
    assert len(recipe["data"]["version"]) == 64
