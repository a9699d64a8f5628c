"""Cells of a comparison several at a time, each in a process of its own that has its share of the devices.

`python -m fm_core.reproduce.parallel CONFIG CELL FOLDER` is such a process: it runs the cell's stages, whose
jobs are the launcher's as ever, and leaves how it ended in FOLDER.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fm_core.config import RunConfig, dump_yaml, load_config
from fm_core.data.manifest import load_manifest
from fm_core.errors import StopRequested, UserError
from fm_core.evaluation.features.extractor import open_extractor
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.launch.detached import spawn_detached
from fm_core.launch.dispatch import GRACE_SECONDS, device_count, world
from fm_core.reproduce.experiments import Experiment, experiments_of
from fm_core.reproduce.image_experiment import PARTS, OnParts, run_experiment
from fm_core.storage.atomic_files import read_json, write_json, write_text

POLL_SECONDS = 0.5
SAY_SECONDS = 1.0
LAST_SECONDS = GRACE_SECONDS + 10
"""How long a process may take to end its job when it is asked to."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ExperimentOutcome:
    """How a cell ended."""

    record: dict[str, Any] | None
    """For results.json; None if it failed."""
    error: str = ""
    trace: str = ""


@dataclass
class _Running:
    number: int
    folder: Path
    process: subprocess.Popen[bytes]
    share: dict[str, str]


def device_shares(config: RunConfig) -> list[dict[str, str]]:
    """What each of reproduce.parallel cells finds in its environment: its GPUs, where there are any.

    Raises UserError where devices do not suffice, or cannot be shared out.
    """
    parallel, launch = config.reproduce.parallel, config.launch
    if parallel > 1 and launch.kind == "debug":
        raise UserError(f"reproduce.parallel {parallel}: launch.kind debug runs one process; set it to 1")
    if parallel > 1 and launch.kind == "ssh":
        raise UserError(
            f"reproduce.parallel {parallel}: with launch.kind ssh every cell takes all of launch.hostfile; "
            "leave it at 1, or launch by slurm"
        )
    if parallel == 1 or launch.kind != "local" or not device_count():
        return [{} for _ in range(parallel)]
    named = os.environ.get(VISIBLE)
    devices = named.split(",")[: device_count()] if named else [str(n) for n in range(device_count())]
    each = launch.processes or max(1, len(devices) // parallel)
    if each * parallel > len(devices):
        raise UserError(
            f"reproduce.parallel {parallel}: that many cells of {each} processes want {each * parallel} GPUs "
            f"and this host has {len(devices)}"
        )
    return [{VISIBLE: ",".join(devices[n * each : (n + 1) * each])} for n in range(parallel)]


def run_in_parallel(
    config: RunConfig, cells: Sequence[Experiment], folder: Path, on_parts: Callable[[int], OnParts]
) -> list[ExperimentOutcome]:
    """Make every cell, reproduce.parallel at a time; how each ended, in their order.

    Args:
        config: of the comparison.
        cells: its cells.
        folder: where the processes are told what to do, and tell how they fare.
        on_parts: what hears how far the cell of a number is.

    Raises:
        StopRequested: one of them was asked to stop; the others were ended then.
        UserError: devices do not suffice.
    """
    free = device_shares(config)
    if config.evaluate.features == "classifier":
        # It is trained when it is first asked for: cells that ask at once would train one each.
        with cpu_threads(world(config.launch)[1]):
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            manifest = load_manifest(config.data.root, config.data.name)
            open_extractor(config.evaluate, config.data.root, manifest, device, _unheard)
    file = folder / "config.yaml"
    write_text(file, dump_yaml(_with_a_share_of_the_cores(config)))
    ended: dict[int, ExperimentOutcome] = {}
    running: list[_Running] = []
    waiting = list(range(len(cells)))
    try:
        while waiting or running:
            while waiting and free:
                number = waiting.pop(0)
                running.append(_start(number, cells[number], folder, file, free.pop(0)))
            time.sleep(POLL_SECONDS)
            for one in list(running):
                _tell(one, on_parts(one.number))
                if one.process.poll() is not None:
                    ended[one.number] = _ended(one)
                    on_parts(one.number)(PARTS, cells[one.number].title)
                    running.remove(one)
                    free.append(one.share)
    finally:
        _end([one.process for one in running])
    return [ended[number] for number in range(len(cells))]


def _with_a_share_of_the_cores(config: RunConfig) -> RunConfig:
    """Threads for the processes of each cell, where nobody has said how many and the cores do the work."""
    if config.launch.threads or config.launch.kind != "local" or device_count():
        return config
    _, threads = world(config.launch)
    share = max(1, threads // config.reproduce.parallel)
    return config.model_copy(update={"launch": config.launch.model_copy(update={"threads": share})})


def _unheard(step: int, steps: int, loss: float) -> None:
    """A classifier's progress that nobody watches."""


def _start(number: int, cell: Experiment, folder: Path, file: Path, share: dict[str, str]) -> _Running:
    own = folder / cell.name
    own.mkdir(parents=True, exist_ok=True)
    for name in ("ended.json", "progress.json"):
        own.joinpath(name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "fm_core.reproduce.parallel", str(file), cell.name, str(own)]
    # The terminal's Ctrl-C comes to the comparison alone, which then ends its cells.
    process = spawn_detached(command, own / "output.log", share)
    return _Running(number, own, process, share)


def _tell(one: _Running, on_parts: OnParts) -> None:
    if said := read_json(one.folder / "progress.json"):
        on_parts(said["parts"], said["message"])


def _ended(one: _Running) -> ExperimentOutcome:
    said = read_json(one.folder / "ended.json")
    if said is None:
        return ExperimentOutcome(None, f"its process was killed (log: {one.folder / 'output.log'})")
    if said["state"] == "stopped":
        raise StopRequested(said["error"])
    return ExperimentOutcome(said.get("record"), said.get("error", ""), said.get("trace", ""))


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to end their jobs; kill what is left, whose jobs the next call takes up."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + LAST_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(file: str, name: str, folder: Path) -> None:
    """Make one cell; the end is written to <folder>/ended.json."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Where the comparison is killed, its cells are: their jobs go on, and are found again.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    config = load_config(file)
    (cell,) = (cell for cell in experiments_of(config) if cell.name == name)
    said_at = 0.0

    def say(parts: int, message: str) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > SAY_SECONDS:
            said_at = time.monotonic()
            write_json(folder / "progress.json", {"parts": parts, "message": message})

    try:
        ended: dict[str, Any] = {
            "state": "done",
            "record": run_experiment(cell, config.reproduce.images, say),
        }
    except (StopRequested, KeyboardInterrupt) as stop:
        ended = {"state": "stopped", "error": str(stop) or "stopped; run it again to continue"}
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        ended = {"state": "failed", "error": said, "trace": traceback.format_exc()}
    write_json(folder / "ended.json", ended)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
