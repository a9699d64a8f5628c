"""Online evaluation, started by `python -m fm_core.stages.score_checkpoints CONFIG`.

A process of the lowest priority scores each checkpoint during training, in its own run directory
<run>/beside; the trainer does not depend on it. The weights of a checkpoint are hard-linked there before they
are scored, so that training and evaluation do not wait for each other; the best weights are kept. Scores are
the lines of <run>/evaluation/beside.jsonl.
"""

import json
import logging
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import checkpoint_directories, fingerprint_of, link_weights
from fm_core.config import GuideSection, LaunchSection, RunConfig, StochasticSection, load_config, merge
from fm_core.errors import LeaseLostError, StopRequested, UserError
from fm_core.launch.online_eval import online_eval_directory, read_online_scores, scores_file
from fm_core.output import log_to_stderr
from fm_core.run.artifact_cache import exclusive_lock
from fm_core.run.directory import RunDirectory, step_name
from fm_core.stages.evaluate import evaluate
from fm_core.stages.sample import sample
from fm_core.storage.atomic_files import append_line, read_json, write_json, write_text
from fm_core.training.ema import ema_decays

LOG = logging.getLogger(__name__)

POLL_SECONDS = 2.0
NICENESS = 19


def score_checkpoints(config: RunConfig) -> None:
    """Repeatedly score the newest checkpoint without a score, until standard input is closed.

    A checkpoint that cannot be scored is reported and skipped.
    """
    failed: set[str] = set()
    with exclusive_lock(online_eval_directory(RunDirectory(config).path)) as check_stop:
        ended = False
        while True:
            step = newest_unscored(config, failed)
            if step is not None:
                try:
                    score(config, step)
                except (LeaseLostError, StopRequested):
                    raise
                except Exception as error:
                    failed.add(CheckpointCatalog.of(config).fingerprints().get(step, ""))
                    traceback.print_exc()
                    LOG.warning("the checkpoint of step %s could not be scored: %s", step, error)
            elif ended:
                return
            else:
                # Standard input is closed only after the last checkpoint of training is complete.
                ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
            check_stop()


def newest_unscored(config: RunConfig, failed: Collection[str] = ()) -> int | None:
    """The step of the newest complete checkpoint, or None if it or a later one has a score.

    Scores of steps that were trained again after a rollback are deleted first. `failed` are hashes of
    checkpoints that could not be scored.
    """
    hashes = CheckpointCatalog.of(config).fingerprints()
    newest = max(hashes, default=None)
    if newest is None or hashes[newest] in failed:
        return None
    path = RunDirectory(config).path
    lines = read_online_scores(path)
    valid = [line for line in lines if line["step"] <= newest and _is_current(line, hashes)]
    if len(valid) < len(lines):
        write_text(scores_file(path), "".join(json.dumps(line) + "\n" for line in valid))
    return newest if newest > max((line["step"] for line in valid), default=0) else None


def _is_current(line: dict[str, Any], hashes: dict[int, str]) -> bool:
    """Whether a score belongs to the current checkpoint of its step; True if that is not recorded."""
    scored, present = line.get("checkpoint"), hashes.get(line["step"])
    return scored is None or present is None or scored == present


def score(config: RunConfig, step: int) -> None:
    """Sample from a checkpoint, score it, record the distance, and keep its weights if it is the best."""
    run = RunDirectory(config)
    started = time.monotonic()
    linked = _link(config, step)
    if linked is None:
        return  # removed in the meantime, so there is a newer one
    scoring = _scoring_config(config, step)
    sample(scoring)
    result = evaluate(scoring)
    scores = read_json(Path(result.paths["scores"])) or {}
    distance = scores["frechet_distance"]
    record = {
        "step": step,
        "checkpoint": fingerprint_of(linked),
        "images_seen": scores["images_seen"],
        "frechet_distance": distance["value"],
        "stderr": distance["stderr"],
        **{key: distance[key] for key in ("covers", "unreliable") if key in distance},
        "images": distance["images"],
        "features": distance["features"],
        **({"classifier_accuracy": accuracy} if (accuracy := _accuracy(scores)) is not None else {}),
        "nfe": scores["nfe"]["mean"],
        "seconds": round(time.monotonic() - started, 1),
    }
    previous = read_json(run.path / "best.json")
    # If the previous best was of the same step, its weights have just been replaced.
    best = previous is None or previous["step"] == step or distance["value"] < previous["frechet_distance"]
    if best:
        write_json(run.path / "best.json", {**record, "checkpoint": str(linked)})
    append_line(scores_file(run.path), record)
    for other in checkpoint_directories(linked.parent):
        if (other != linked) == best:
            shutil.rmtree(other)
    shutil.rmtree(RunDirectory(scoring).samples, ignore_errors=True)


def _accuracy(scores: dict[str, Any]) -> float | None:
    return scores.get("classifier", {}).get("held_out_accuracy")


def _scoring_config(config: RunConfig, step: int) -> RunConfig:
    """Configuration of the scoring stages: another run directory, the same data, network and seed.

    Only the Fréchet distance of samples of the checkpoint is computed.
    """
    run, online = RunDirectory(config).path, config.evaluate.online
    available = ("ema", "raw", *ema_decays(config.train))
    tree = {
        "run": {"root": str(run), "name": "beside"},
        "train": {"checkpoint_root": str(run / "beside" / "checkpoints")},
        "evaluate": {
            "metrics": ("frechet_distance",),
            "extractors": (),
            "samples": None,
            "reference_out": None,
            "output": None,
            "likelihood": {"images": 0},
            "nfe_curve": {"images": 0},
            "online": {"images": 0},
        },
        "launch": LaunchSection(processes=online.processes, threads=online.threads).model_dump(),
        "sample": {
            "images": online.images,
            "batch": min(online.images, config.sample.batch),
            "step": step,
            "weights": config.sample.weights if config.sample.weights in available else "ema",
            "solver": online.solver,
            "steps": online.steps,
            "trajectories": 0,
            "root": None,
            "store": "uint8",
            **{"grid": "uniform", "grid_rho": None, "grid_shift": None, "grid_bounds": None},
            "stochastic": StochasticSection().model_dump(),
            # The weaker model may be an earlier checkpoint, which is not among these.
            **({"guide": GuideSection().model_dump(), "guidance": 1.0} if config.sample.guide.named else {}),
            **(dict.fromkeys(("rtol", "atol", "error_norm")) if online.steps else {}),
        },
    }
    return RunConfig.model_validate(merge(config.model_dump(), tree))


def _link(config: RunConfig, step: int) -> Path | None:
    """Hard-link the weights of a checkpoint under beside/checkpoints; None if the checkpoint was removed."""
    source = CheckpointCatalog.of(config).folder / step_name(step)
    target = RunDirectory(config).path / "beside" / "checkpoints" / step_name(step)
    shutil.rmtree(target, ignore_errors=True)
    try:
        link_weights(source, target)
    except FileNotFoundError:
        shutil.rmtree(target)
        return None
    return target


def main(config_file: str) -> None:
    """Score until training ends; SIGTERM also ends scoring in progress."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log_to_stderr()
    os.nice(NICENESS)
    try:
        score_checkpoints(load_config(config_file))
    except (UserError, LeaseLostError, StopRequested, KeyboardInterrupt) as reason:
        print(f"online evaluation: {reason or 'stopped'}", flush=True)
    except Exception as error:
        traceback.print_exc()
        LOG.warning("online evaluation has ended, checkpoints are no longer scored: %s", error)


if __name__ == "__main__":
    main(sys.argv[1])
