"""Scores of each checkpoint while training goes on: `python -m fm_core.stages.score_checkpoints CONFIG`.

A process of the lowest priority beside the trainer, in a run directory of its own, <run>/beside: training
does not know of it. A checkpoint's weights are linked there before they are scored, so that neither waits for
the other; the best stay. Scores are the lines of <run>/evaluation/beside.jsonl.
"""

import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from fm_core.config import LaunchSection, RunConfig, load_config, merge
from fm_core.errors import StopRequested, UserError
from fm_core.launch.online_eval import online_eval_directory, read_online_scores, scores_file
from fm_core.run.artifact_cache import exclusive_lock
from fm_core.run.directory import RunDirectory, step_name
from fm_core.stages.evaluate import evaluate
from fm_core.stages.sample import sample
from fm_core.storage.atomic_files import append_line, read_json, write_json, write_text
from fm_core.storage.hashing import sha256_file
from fm_core.storage.local_paths import local_path
from fm_core.training.lr_schedule import ema_decays

POLL_SECONDS = 2.0
NICENESS = 19


def score_checkpoints(config: RunConfig) -> None:
    """Score the newest checkpoint that has no score yet, again and again until standard input ends.

    One that cannot be scored is told and passed over.
    """
    failed: set[str] = set()
    with exclusive_lock(online_eval_directory(RunDirectory(config).path)) as obey:
        ended = False
        while True:
            step = newest_unscored(config, failed)
            if step is not None:
                try:
                    score(config, step)
                except StopRequested:
                    raise
                except Exception as error:
                    failed.add(_marks(config).get(step, ""))
                    traceback.print_exc()
                    print(f"WARNING: the checkpoint of step {step} has no score: {error}", flush=True)
            elif ended:
                return
            else:
                # Training's last checkpoint was complete before its end was told.
                ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
            obey()


def newest_unscored(config: RunConfig, failed: Collection[str] = ()) -> int | None:
    """The step of the newest complete checkpoint, unless it or a later one has a score.

    Scores of steps that were trained again since, after training went back, are forgotten first. `failed` are
    marks of checkpoints that could not be scored.
    """
    marks = _marks(config)
    newest = max(marks, default=None)
    if newest is None or marks[newest] in failed:
        return None
    path = RunDirectory(config).path
    lines = read_online_scores(path)
    valid = [line for line in lines if line["step"] <= newest and _stands(line, marks)]
    if len(valid) < len(lines):
        write_text(scores_file(path), "".join(json.dumps(line) + "\n" for line in valid))
    return newest if newest > max((line["step"] for line in valid), default=0) else None


def _stands(line: dict[str, Any], marks: dict[int, str]) -> bool:
    """Whether a score is of the checkpoint of its step, as far as that can be told."""
    scored, there = line.get("checkpoint"), marks.get(line["step"])
    return scored is None or there is None or scored == there


def _checkpoints(config: RunConfig) -> Path:
    """Folder of the checkpoints; `check_online_eval` has refused any other URL."""
    folder = local_path(RunDirectory(config).checkpoints)
    assert folder is not None
    return folder


def _marks(config: RunConfig) -> dict[int, str]:
    """For each complete checkpoint, by step, what tells it from another of the same step."""
    marks: dict[int, str] = {}
    for mark in _checkpoints(config).glob("step-*/COMPLETE"):
        with suppress(FileNotFoundError):  # it was removed meanwhile
            marks[int(mark.parent.name.removeprefix("step-"))] = sha256_file(mark)
    return marks


def score(config: RunConfig, step: int) -> None:
    """Draw from a checkpoint, score it, note the distance, and keep its weights if they are the best."""
    run = RunDirectory(config)
    began = time.monotonic()
    linked = _link(config, step)
    if linked is None:
        return  # it was removed meanwhile; a newer one is there
    elsewhere = _elsewhere(config, step)
    sample(elsewhere)
    result = evaluate(elsewhere)
    scores = read_json(Path(result.paths["scores"])) or {}
    distance = scores["frechet_distance"]
    record = {
        "step": step,
        "checkpoint": sha256_file(linked / "COMPLETE"),
        "images_seen": scores["images_seen"],
        "frechet_distance": distance["value"],
        "stderr": distance["stderr"],
        "images": distance["images"],
        "features": distance["features"],
        "nfe": scores["nfe"]["mean"],
        "seconds": round(time.monotonic() - began, 1),
    }
    before = read_json(run.path / "best.json")
    # Where the best was of this very step, its weights have just been replaced.
    best = before is None or before["step"] == step or distance["value"] < before["frechet_distance"]
    if best:
        write_json(run.path / "best.json", {**record, "checkpoint": str(linked)})
    append_line(scores_file(run.path), record)
    for other in linked.parent.glob("step-*"):
        if (other != linked) == best:
            shutil.rmtree(other)
    shutil.rmtree(RunDirectory(elsewhere).samples, ignore_errors=True)


def _elsewhere(config: RunConfig, step: int) -> RunConfig:
    """The configuration of the stages that score: another run directory, the same data, network and seed.

    Of what is scored only the distance is wanted, of samples of the checkpoint itself.
    """
    run, beside = RunDirectory(config).path, config.evaluate.beside
    kept = ("ema", "raw", *ema_decays(config.train))
    tree = {
        "run": {"root": str(run), "name": "beside"},
        "train": {"checkpoint_root": str(run / "beside" / "checkpoints")},
        "evaluate": {
            "metrics": ("frechet_distance",),
            "samples": None,
            "reference_out": None,
            "likelihood": {"images": 0},
            "nfe_curve": {"images": 0},
            "beside": {"images": 0},
        },
        "launch": LaunchSection(processes=beside.processes, threads=beside.threads).model_dump(),
        "sample": {
            "images": beside.images,
            "batch": min(beside.images, config.sample.batch),
            "step": step,
            "weights": config.sample.weights if config.sample.weights in kept else "ema",
            "solver": beside.solver,
            "steps": beside.steps,
            "trajectories": 0,
            "root": None,
            **({"rtol": None, "atol": None} if beside.steps else {}),
        },
    }
    return RunConfig.model_validate(merge(config.model_dump(), tree))


def _link(config: RunConfig, step: int) -> Path | None:
    """Weights and mark of a checkpoint under beside/checkpoints; None if they are gone."""
    run = RunDirectory(config)
    source = _checkpoints(config) / step_name(step)
    target = run.path / "beside" / "checkpoints" / step_name(step)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        for path in (*source.glob("*.safetensors"), source / "state.json", source / "COMPLETE"):
            _copy(path, target / path.name)
    except FileNotFoundError:
        shutil.rmtree(target)
        return None
    return target


def _copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system
        shutil.copy2(source, target)


def main(config_file: str) -> None:
    """Score until training has ended; SIGTERM ends what is being scored as well."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.nice(NICENESS)
    try:
        score_checkpoints(load_config(config_file))
    except (UserError, StopRequested, KeyboardInterrupt) as end:
        print(f"beside: {end or 'stopped'}", flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"WARNING: checkpoints are no longer scored: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
