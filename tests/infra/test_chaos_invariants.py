"""The checkers of the chaos test find what they look for: missing, doubled and changed steps, deletions."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from infra.chaos_faults.checkpoint_watch import (
    CompleteCheckpoint,
    RetentionWatch,
    Snapshot,
    folder_snapshot,
)
from infra.chaos_faults.invariants import final_problems, hash_problems, line_problems, tensor_problems

LINES = [{"step": step, "loss": step / 3, "seconds": step * 1.0} for step in range(1, 5)]


def line(step, **changes):
    return {**LINES[step - 1], **changes}


def test_equal_lines_are_accepted_whatever_their_times():
    assert line_problems("metrics", [line(step, seconds=9.0) for step in range(1, 5)], LINES) == []


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([line(1), line(2), line(4)], "step 3 is missing"),
        ([line(1), line(2), line(2), line(3), line(4)], "step 2 is there 2 times"),
        ([line(1), line(3), line(2), line(4)], "steps are not in order"),
        ([*LINES, {"step": 5}], "unexpected step 5"),
        ([line(1), line(2), line(3, loss=np.nextafter(1.0, 2.0)), line(4)], "loss of step 3"),
        ([line(1), line(2), line(3, rollbacks=1), line(4)], "rollbacks of step 3"),
    ],
)
def test_a_line_that_is_missing_doubled_misplaced_or_changed_is_found(lines, problem):
    problems = line_problems("metrics", lines, LINES)
    assert any(problem in text for text in problems), problems


def checkpoint(folder, step, value=1.0, loss=0.5):
    place = folder / f"step-{step:08}"
    place.mkdir(parents=True)
    save_file({"w": np.array([value, 2.0], np.float32)}, place / "raw.safetensors")
    (place / "state.json").write_text(json.dumps({"step": step, "held_out_loss": loss}))
    from hashlib import sha256

    files = {path.name: {"sha256": sha256(path.read_bytes()).hexdigest()} for path in place.iterdir()}
    (place / "COMPLETE").write_text(json.dumps({"files": files, "job": f"{folder.name}"}))
    return place


def test_one_bit_of_a_tensor_is_found(tmp_path):
    right = checkpoint(tmp_path / "right", 4)
    assert tensor_problems(checkpoint(tmp_path / "same", 4), right) == []
    other = checkpoint(tmp_path / "other", 4, value=np.nextafter(np.float32(1), np.float32(2)))
    assert tensor_problems(other, right) == ["step-00000004/raw.safetensors: w differs"]
    (other / "raw.safetensors").unlink()
    assert tensor_problems(other, right) == ["step-00000004: no raw.safetensors"]
    assert hash_problems(right) == []
    assert hash_problems(other) == ["step-00000004/raw.safetensors: No such file or directory"]


def test_a_run_without_its_end_is_found(tmp_path):
    for name in ("run", "reference"):
        train = tmp_path / name / "train"
        checkpoint(train / "checkpoints", 4)
        for file in ("metrics.jsonl", "held_out.jsonl"):
            (train / file).write_text("".join(json.dumps(line) + "\n" for line in LINES))
        (train / "DONE.json").write_text(json.dumps({"checkpoint": "step-00000004"}))
    run, reference = tmp_path / "run", tmp_path / "reference"
    places = run / "train" / "checkpoints", reference, reference / "train" / "checkpoints"
    assert final_problems(run, *places) == []
    (run / "train" / "held_out.jsonl").write_text("")
    assert any("held_out.jsonl: step 1 is missing" in problem for problem in final_problems(run, *places))
    (run / "train" / "DONE.json").unlink()
    assert any("DONE.json cannot be read" in problem for problem in final_problems(run, *places))


def complete(*steps, losses=None):
    losses = losses or {}
    return {step: CompleteCheckpoint(f"fingerprint-{step}", losses.get(step, 1.0 / step)) for step in steps}


def watched(*snapshots):
    watch = RetentionWatch(retained=2)
    for present in snapshots:
        watch.observe(present if isinstance(present, Snapshot) else Snapshot(present))
    return watch


def test_superseded_checkpoints_may_go():
    watch = watched(complete(1), complete(1, 2), complete(2, 3), complete(3, 4))
    assert (watch.problems, watch.completed, watch.removed) == ([], 4, 2)


@pytest.mark.parametrize(
    ("snapshots", "problem"),
    [
        ((complete(1, 2), complete(2)), "checkpoint 1 was deleted while only [2] were there"),
        ((complete(1, 2, 3), complete(1, 2)), "checkpoint 3 was deleted"),
        ((complete(1, 2, 3), {}), "checkpoint 3 was deleted while only []"),
        (
            (complete(1, 2, 3, losses={1: 0.1, 2: 1, 3: 1}), complete(2, 3, losses={2: 1, 3: 1})),
            "checkpoint 1, the best",
        ),
        ((complete(1, 2), Snapshot(complete(2), removing={"fingerprint-1"}), complete(2)), "checkpoint 1"),
        (
            (complete(1, 2, 3), Snapshot(complete(2, 3), aside={"fingerprint-1"}), complete(2, 3)),
            "after it was set aside",
        ),
    ],
)
def test_a_deletion_that_the_retention_rule_does_not_allow_is_found(snapshots, problem):
    watch = watched(*snapshots)
    assert any(problem in text for text in watch.problems), watch.problems


def test_a_removal_that_is_undone_and_a_checkpoint_set_aside_are_not_deletions():
    undone = watched(complete(1, 2), Snapshot(complete(2), removing={"fingerprint-1"}), complete(1, 2))
    assert undone.problems == []
    aside = watched(complete(1, 2), Snapshot(complete(2), aside={"fingerprint-1"}))
    assert (aside.problems, aside.removed) == ([], 0)
    assert aside.set_aside == ["step 1 (fingerpr) was set aside"]


def test_a_checkpoint_that_is_replaced_by_another_of_its_step_counts_as_deleted():
    other = {2: CompleteCheckpoint("other", 0.5)}
    assert "checkpoint 2 was deleted" in watched(complete(2), other).problems[0]


def test_only_complete_directories_of_a_folder_are_seen(tmp_path):
    checkpoint(tmp_path, 1, loss=0.25)
    (checkpoint(tmp_path, 2) / "COMPLETE").unlink()
    checkpoint(tmp_path, 3).rename(tmp_path / ".removing-step-00000003.e1-12345678")
    checkpoint(tmp_path, 4, loss=0.1).rename(tmp_path / "set-aside-step-00000004.e1-12345678")
    snapshot = folder_snapshot(tmp_path)
    assert snapshot is not None
    assert {step: seen.loss for step, seen in snapshot.present.items()} == {1: 0.25}
    assert (len(snapshot.removing), len(snapshot.aside)) == (1, 1)
    assert folder_snapshot(tmp_path / "unmounted") is None
