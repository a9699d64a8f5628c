"""Scores of each checkpoint while training goes on: `python -m fm_core.stages.beside CONFIG`.

A process of the lowest priority beside the trainer, in a run directory of its own, <run>/beside: training
does not know of it. A checkpoint's weights are linked there before they are scored, so that neither waits for
the other; the best stay. Scores are the lines of <run>/evaluation/beside.jsonl.
"""

import os
import select
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from fm_core.config import LaunchSection, RunConfig, load_config, merge
from fm_core.errors import Stopped, UserError
from fm_core.run.beside import scores_beside, workplace
from fm_core.run.cell import alone
from fm_core.run.directory import RunDirectory, step_name
from fm_core.run.files import append_line, read_json, write_json
from fm_core.stages.evaluate import evaluate
from fm_core.stages.sample import sample

POLL_SECONDS = 2.0
NICENESS = 19


def score_checkpoints(config: RunConfig) -> None:
    """Score the newest checkpoint that has no score yet, again and again until standard input ends."""
    with alone(workplace(RunDirectory(config).path)) as beat:
        ended = False
        while True:
            step = newest_unscored(config)
            if step is not None:
                score(config, step)
            elif ended:
                return
            else:
                # Training's last checkpoint was complete before its end was told.
                ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
            beat()


def newest_unscored(config: RunConfig) -> int | None:
    """The step of the newest complete checkpoint, unless it or a later one has a score."""
    run = RunDirectory(config)
    marks = Path(run.checkpoints.removeprefix("file://")).glob("step-*/COMPLETE")
    newest = max((int(mark.parent.name.removeprefix("step-")) for mark in marks), default=None)
    scored = max((line["step"] for line in scores_beside(run.path)), default=0)
    return newest if newest is not None and newest > scored else None


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
    before = min((line["frechet_distance"] for line in scores_beside(run.path)), default=float("inf"))
    record = {
        "step": step,
        "images_seen": scores["images_seen"],
        "frechet_distance": distance["value"],
        "stderr": distance["stderr"],
        "images": distance["images"],
        "features": distance["features"],
        "nfe": scores["nfe"]["mean"],
        "seconds": round(time.monotonic() - began, 1),
    }
    best = distance["value"] < before
    if best:
        write_json(run.path / "best.json", {**record, "checkpoint": str(linked)})
    append_line(run.path / "evaluation" / "beside.jsonl", record)
    for other in linked.parent.glob("step-*"):
        if (other != linked) == best:
            shutil.rmtree(other)
    shutil.rmtree(RunDirectory(elsewhere).samples, ignore_errors=True)


def _elsewhere(config: RunConfig, step: int) -> RunConfig:
    """The configuration of the stages that score: another run directory, the same data, network and seed."""
    run, beside = RunDirectory(config).path, config.evaluate.beside
    tree = {
        "run": {"root": str(run), "name": "beside"},
        "train": {"checkpoint_root": str(run / "beside" / "checkpoints")},
        "evaluate": {"likelihood": {"images": 0}, "beside": {"images": 0}},
        "launch": LaunchSection(processes=beside.processes, threads=beside.threads).model_dump(),
        "sample": {
            "images": beside.images,
            "batch": min(beside.images, config.sample.batch),
            "step": step,
            "solver": beside.solver,
            "steps": beside.steps,
            "root": None,
            **({"rtol": None, "atol": None} if beside.steps else {}),
        },
    }
    return RunConfig.model_validate(merge(config.model_dump(), tree))


def _link(config: RunConfig, step: int) -> Path | None:
    """Weights and mark of a checkpoint under beside/checkpoints; None if they are gone."""
    run = RunDirectory(config)
    source = Path(run.checkpoints.removeprefix("file://")) / step_name(step)
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
    except (UserError, Stopped, KeyboardInterrupt) as end:
        print(f"beside: {end or 'stopped'}", flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"WARNING: checkpoints are no longer scored: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
