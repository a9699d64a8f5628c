"""A run with checkpoints on an S3 server: a rank hangs, local files are lost, one process resumes it."""

import shutil
import socket
import threading

import pytest

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.launch.dispatch import processes_of, submitted
from fm_core.storage.atomic_files import read_json, read_lines
from tests.support.tiny_run import DEBUG, TinyRun, is_progress

HANG_SECONDS = 10
"""Longer than a step takes on a busy machine."""


@pytest.fixture(scope="module")
def run_in_a_store(tiny, s3):
    keys = {
        "checkpoint_root": "s3://bucket/run",
        "ema_power_widths": [0.05, 0.1],
        "snapshot_images": 64,
        "keep_checkpoints": 1,
        "keep_every_images": 128,
    }
    run = TinyRun(
        tiny.root, "stored", {"method": {"path": "tests.support.fault_injection:FaultyPath"}, "train": keys}
    )
    run_in_a_store = {"run": run}

    def call(name, command, *arguments, **variables):
        called = run.fm(command, *arguments, **variables)
        lines = [line for line in called.err.splitlines() if not is_progress(line)]
        run_in_a_store[name] = {
            "code": called.code,
            "errors": lines,
            "steps": CheckpointCatalog.of(run.config).steps(),
        }

    call("three", "train", "--launch.processes", "3")
    # Rank 1 draws four batches, four of validation images at the checkpoint of step 4, then stops dead.
    hang = ("--launch.restarts", "0", "--train.hang_seconds", str(HANG_SECONDS))
    call("hang", "train", *hang, FAULT="1:SIGSTOP:10")
    run_in_a_store["left"] = processes_of(submitted(run.path))
    shutil.rmtree(run.path / "train" / "staging")
    # The store is unavailable when training starts again, and available later.
    s3.stop()
    back = threading.Thread(target=s3.start_after, args=(run.path / "logs" / "restarts.jsonl",))
    back.start()
    call("end", "train", "--launch.processes", "1", "--launch.restart_seconds", "1", AWS_MAX_ATTEMPTS="1")
    back.join()
    call("again", "train")
    call("sample", "sample", *DEBUG, "--sample.weights", "ema-power-0.07")
    call("none", "sample", "--sample.weights", "ema-power-0.5")
    return run_in_a_store


def test_a_world_that_does_not_divide_the_batch_is_one_line(run_in_a_store):
    assert run_in_a_store["three"]["code"] == 2
    assert run_in_a_store["three"]["errors"] == [
        "fm: train.global_batch 16 does not divide over 3 processes; change it or launch.processes"
    ]


def test_a_rank_that_hangs_is_named_with_its_host_and_nothing_is_left(run_in_a_store):
    hang = run_in_a_store["hang"]
    assert hang["code"] == 1
    assert len(hang["errors"]) == 1
    assert f"rank 1 on {socket.gethostname()} sends no heartbeat" in hang["errors"][0]
    assert f"no progress for {HANG_SECONDS} s" in hang["errors"][0]
    assert hang["steps"] == [4]
    assert run_in_a_store["left"] == []
    # Every rank that was able to wrote its stack trace.
    log = (run_in_a_store["run"].path / "logs" / "train-0.log").read_text()
    assert "most recent call first" in log


def test_one_process_without_local_files_finishes_what_two_began(run_in_a_store):
    assert run_in_a_store["end"]["code"] == 0, run_in_a_store["end"]["errors"]
    run = run_in_a_store["run"]
    log = (run.path / "logs" / "train-0.log").read_text()
    assert "written by 2 processes, resharded for 1" in log
    done = read_json(run.path / "train" / "DONE.json")
    assert (done["checkpoint"], done["images_seen"], done["position"]) == ("step-00000020", 320, 320)
    assert [line["step"] for line in read_lines(run.path / "train" / "metrics.jsonl")][-1] == 20


def test_a_store_that_is_unavailable_at_the_start_is_waited_for(run_in_a_store):
    (record,) = read_lines(run_in_a_store["run"].path / "logs" / "restarts.jsonl")
    assert "s3://bucket/run" in record["because"]
    assert "tried 5 times" in record["because"]


def test_the_store_holds_the_last_every_mth_and_the_best_and_here_only_the_last(run_in_a_store):
    run = run_in_a_store["run"]
    held_out = read_lines(run.path / "train" / "held_out.jsonl")
    assert [line["step"] for line in held_out] == [4, 8, 12, 16, 20]
    best = min(held_out, key=lambda line: line["loss"])["step"]
    assert run_in_a_store["end"]["steps"] == sorted({8, 16, 20, best})
    assert [path.name for path in (run.path / "train" / "staging").glob("step-*")] == ["step-00000020"]
    assert CheckpointCatalog.of(run.config).snapshots().steps() == [4, 8, 12, 16, 20]


def test_called_again_it_asks_the_store_and_is_done(run_in_a_store):
    assert run_in_a_store["again"]["code"] == 0


def test_samples_are_made_of_an_average_that_training_did_not_keep(run_in_a_store):
    assert run_in_a_store["sample"]["code"] == 0, run_in_a_store["sample"]["errors"]
    run = run_in_a_store["run"]
    assert (run.path / "train" / "averages" / "step-00000020" / "ema-power-0.07.safetensors").exists()
    assert [path.name for path in (run.path / "samples" / "step-00000020").glob("ema-power-0.07-*")]
    assert run_in_a_store["none"]["code"] == 2
    assert "ema-power-0.5: a relative width must be between 0 and 0.28" in run_in_a_store["none"]["errors"][0]
