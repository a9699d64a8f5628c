"""Invariants at the end of an episode: metrics and weights equal those of the undisturbed run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

TIMED = {"seconds", "images_per_s", "data_seconds", "memory_bytes", "tflops_per_device", "mfu"}
"""Entries of a metrics line that measure the machine, not the model."""
TIMED_STATE = {"seconds", "schema"}
REPORTED = 5
"""Maximum number of reported differences per kind."""


def line_problems(
    name: str, lines: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Differences between the lines of a run and those of the undisturbed run.

    Every step must occur exactly once, in order, with bit-identical values.
    """
    problems: list[str] = []
    steps, right = [line.get("step") for line in lines], [line["step"] for line in expected]
    problems += [f"{name}: step {step} is missing" for step in right if step not in steps]
    problems += [
        f"{name}: step {step} is there {steps.count(step)} times"
        for step in sorted({step for step in steps if step is not None})
        if steps.count(step) > 1
    ]
    problems += [f"{name}: unexpected step {step}" for step in steps if step not in right]
    if not problems and steps != right:
        problems.append(f"{name}: steps are not in order")
    by_step = {line["step"]: line for line in expected}
    for line in lines:
        reference = by_step.get(line.get("step"))
        if reference is None:
            continue
        for key in sorted((line.keys() | reference.keys()) - TIMED):
            # Python reads and writes floats so that equal text means equal bits.
            if json.dumps(line.get(key)) != json.dumps(reference.get(key)):
                problems.append(
                    f"{name}: {key} of step {line['step']} is {line.get(key)!r}, not {reference.get(key)!r}"
                )
    return _shortened(problems)


def tensor_problems(folder: Path, expected: Path) -> list[str]:
    """Differences between two checkpoints, tensor by tensor, bit for bit."""
    names, right = _files(folder), _files(expected)
    problems = [f"{folder.name}: no {name}" for name in sorted(right - names)]
    problems += [f"{folder.name}: unexpected {name}" for name in sorted(names - right)]
    for name in sorted(names & right):
        actual, reference = load_file(folder / name), load_file(expected / name)
        for tensor in sorted(actual.keys() | reference.keys()):
            if tensor not in actual or tensor not in reference:
                problems.append(f"{folder.name}/{name}: {tensor} is only in one of both")
            elif _bits(actual[tensor]) != _bits(reference[tensor]):
                problems.append(f"{folder.name}/{name}: {tensor} differs")
    return _shortened(problems)


def state_problems(folder: Path, expected: Path) -> list[str]:
    """Differences between the training states of two checkpoints."""
    actual, reference = (
        json.loads((path / "state.json").read_text(encoding="utf-8")) for path in (folder, expected)
    )
    return [
        f"{folder.name}/state.json: {key} is {actual.get(key)!r}, not {reference.get(key)!r}"
        for key in sorted((actual.keys() | reference.keys()) - TIMED_STATE)
        if actual.get(key) != reference.get(key)
    ]


def hash_problems(folder: Path) -> list[str]:
    """Files of a checkpoint that do not match its COMPLETE."""
    try:
        files = json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder.name}: COMPLETE cannot be read: {error}"]
    problems: list[str] = []
    for name, facts in files.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            problems.append(f"{folder.name}/{name}: {error.strerror}")
            continue
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            problems.append(f"{folder.name}/{name} does not match its SHA-256")
    return problems


def final_problems(run: Path, checkpoints: Path, reference: Path, reference_checkpoints: Path) -> list[str]:
    """All differences between a run that has ended and the undisturbed one."""
    problems: list[str] = []
    for name in ("metrics.jsonl", "held_out.jsonl"):
        try:
            lines = [
                json.loads(line) for line in (run / "train" / name).read_text(encoding="utf-8").splitlines()
            ]
        except (OSError, ValueError) as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        expected = [
            json.loads(line) for line in (reference / "train" / name).read_text(encoding="utf-8").splitlines()
        ]
        problems += line_problems(name, lines, expected)
    done = json.loads((reference / "train" / "DONE.json").read_text(encoding="utf-8"))
    try:
        mine = json.loads((run / "train" / "DONE.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [*problems, f"DONE.json cannot be read: {error}"]
    if mine["checkpoint"] != done["checkpoint"]:
        problems.append(f"DONE.json names {mine['checkpoint']}, not {done['checkpoint']}")
    last = checkpoints / done["checkpoint"]
    damage = hash_problems(last)
    if damage:
        return problems + damage
    right = reference_checkpoints / done["checkpoint"]
    return problems + tensor_problems(last, right) + state_problems(last, right)


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


def _bits(tensor: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tensor.shape, tensor.tobytes()


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - REPORTED
    return problems if more <= 0 else [*problems[:REPORTED], f"... and {more} more"]
