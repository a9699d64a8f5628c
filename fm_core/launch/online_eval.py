"""Online evaluation: start and stop of the process that scores checkpoints during training."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import UserError
from fm_core.launch.detached import spawn_detached
from fm_core.run.directory import RunDirectory
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import read_lines, write_text
from fm_core.storage.local_paths import local_path

MODULE = "fm_core.stages.score_checkpoints"
MIN_IMAGES = 4
"""Minimum number of samples for a Fréchet distance and its standard error."""
END_SECONDS = 40.0
"""Seconds in which the process must end its own jobs when it is stopped."""


def read_online_scores(run: Path) -> list[dict[str, Any]]:
    """The scores so far, oldest first: step, images_seen, frechet_distance, stderr, ..."""
    return read_lines(scores_file(run))


def scores_file(run: Path) -> Path:
    """File of the scores: one JSON line for each scored checkpoint."""
    return run / "evaluation" / "beside.jsonl"


def online_eval_directory(run: Path) -> Path:
    """Directory whose lease the process holds."""
    return run / "beside" / "scoring"


def check_online_eval(config: RunConfig) -> None:
    """Check the settings of evaluate.online. Raises UserError for those that could not be scored."""
    online = config.evaluate.online
    if not online.images:
        return
    # Imported here, because torch takes seconds to import and most starts do not need it.
    from fm_core.method.ode import Solver

    if online.images < MIN_IMAGES:
        raise UserError(f"evaluate.online.images {online.images}: a distance needs at least {MIN_IMAGES}")
    Solver(method=online.solver, steps=online.steps)
    if local_path(RunDirectory(config).checkpoints) is None:
        raise UserError("evaluate.online: train.checkpoint_root must be a directory, to link weights from")


@contextmanager
def online_evaluation(config: RunConfig) -> Generator[None]:
    """Score checkpoints in another process during the block; at its normal end, wait for the last score.

    Errors of that process do not affect training; they are in logs/train-beside.log.
    """
    if not config.evaluate.online.images:
        yield
        return
    run = RunDirectory(config).path
    stop_online_eval(run)  # one left by a supervisor that was killed
    process = _start(config, run)
    try:
        yield
        process.communicate()  # closes its standard input, which signals the end of training
    finally:
        process.terminate()
        stop_online_eval(run)
        process.wait()


def stop_online_eval(run: Path) -> None:
    """End the process that scores a run's checkpoints, if one runs on this host."""
    process = Lease(online_eval_directory(run) / "lock").process()
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        _, left = psutil.wait_procs([process], END_SECONDS)
        for survivor in left:
            survivor.kill()


def _start(config: RunConfig, run: Path) -> subprocess.Popen[bytes]:
    config_file = run / "logs" / "beside.yaml"
    write_text(config_file, dump_yaml(config))
    devices = config.evaluate.online.devices
    return spawn_detached(
        [sys.executable, "-m", MODULE, str(config_file)],
        run / "logs" / "train-beside.log",
        {"CUDA_VISIBLE_DEVICES": devices} if devices is not None else {},
        stdin=subprocess.PIPE,
    )
