"""The process that scores checkpoints while training goes on, seen from the training's side."""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import read_lines, write_text
from fm_core.storage.local_paths import local_path

MODULE = "fm_core.stages.score_checkpoints"
MIN_IMAGES = 4
"""A Fréchet distance and its error need so many samples."""
END_SECONDS = 40.0
"""How long the process may take to end its own jobs when it is stopped."""


def read_online_scores(run: Path) -> list[dict[str, Any]]:
    """The scores so far, in the order they were made: step, images_seen, frechet_distance, stderr, ..."""
    return read_lines(scores_file(run))


def scores_file(run: Path) -> Path:
    """Where they are: one JSON line for each scored checkpoint."""
    return run / "evaluation" / "beside.jsonl"


def online_eval_directory(run: Path) -> Path:
    """The directory of which the process holds the lease."""
    return run / "beside" / "scoring"


def check_online_eval(config: RunConfig) -> None:
    """Refuse settings by which nothing could be scored. Raises UserError."""
    beside = config.evaluate.beside
    if not beside.images:
        return
    # Here and not above, since torch takes seconds that the start of a flow need not wait for.
    from fm_core.method.ode import Solver

    if beside.images < MIN_IMAGES:
        raise UserError(f"evaluate.beside.images {beside.images}: a distance needs at least {MIN_IMAGES}")
    Solver(method=beside.solver, steps=beside.steps)
    if local_path(RunDirectory(config).checkpoints) is None:
        raise UserError("evaluate.beside: train.checkpoint_root must be a directory, to link weights from")


@contextmanager
def online_evaluation(config: RunConfig) -> Generator[None]:
    """While it is open a process scores the checkpoints; when all went well it finishes the last one first.

    What goes wrong over there stays over there, in logs/train-beside.log.
    """
    if not config.evaluate.beside.images:
        yield
        return
    run = RunDirectory(config).path
    stop_online_eval(run)  # that of a supervisor that was killed
    process = _start(config, run)
    try:
        yield
        process.communicate()  # its standard input ends: so has training
    finally:
        process.terminate()
        stop_online_eval(run)
        process.wait()


def stop_online_eval(run: Path) -> None:
    """End the process that scores a run's checkpoints, if there is one on this host."""
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
    devices = config.evaluate.beside.devices
    with (run / "logs" / "train-beside.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, str(config_file)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **({"CUDA_VISIBLE_DEVICES": devices} if devices is not None else {})},
        )
