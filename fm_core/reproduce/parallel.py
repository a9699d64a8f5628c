"""Experiments of a comparison in parallel, each in its own process with its share of the devices.

Each process is `python -m fm_core.reproduce.parallel CONFIG NAME FOLDER ENTRY_POINT`. It runs the stages of
the experiment, whose jobs the launcher starts as usual, and writes the outcome to FOLDER. ENTRY_POINT is
`StageFunctions.entry_point`.
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
from fm_core.evaluation.features.open_extractor import open_extractor
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.launch.detached import spawn_detached
from fm_core.launch.dispatch import GRACE_SECONDS, device_count, world
from fm_core.reproduce.experiments import Experiment, experiments_of
from fm_core.reproduce.image_experiment import PROGRESS_PARTS, OnProgress, run_experiment
from fm_core.run.stage_functions import StageFunctions
from fm_core.storage.atomic_files import read_json, write_json, write_text

POLL_SECONDS = 0.5
PROGRESS_SECONDS = 1.0
TERMINATION_SECONDS = GRACE_SECONDS + 10
"""Seconds within which a process must end its job after a request to stop."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ExperimentOutcome:
    """Outcome of an experiment."""

    record: dict[str, Any] | None
    """Record for results.json; None if the experiment failed."""
    error: str = ""
    traceback: str = ""

    @classmethod
    def of_error(cls, error: Exception, traceback: str) -> "ExperimentOutcome":
        """The outcome of an experiment that raised an exception."""
        return cls(None, f"{type(error).__name__}: {error}".splitlines()[0], traceback)


@dataclass
class _ExperimentProcess:
    number: int
    folder: Path
    process: subprocess.Popen[bytes]
    devices: dict[str, str]


def device_shares(config: RunConfig) -> list[dict[str, str]]:
    """Environment variables that select the GPUs, if any, of each of the reproduce.parallel processes.

    Raises:
        UserError: there are not enough devices, or they cannot be divided.
    """
    parallel, launch = config.reproduce.parallel, config.launch
    if parallel > 1 and launch.kind == "debug":
        raise UserError(f"reproduce.parallel {parallel}: launch.kind debug runs one process; set it to 1")
    if parallel > 1 and launch.kind == "ssh":
        raise UserError(
            f"reproduce.parallel {parallel}: with launch.kind ssh every experiment uses all hosts of "
            "launch.hostfile; leave it at 1, or launch by slurm"
        )
    if parallel == 1 or launch.kind != "local" or not device_count():
        return [{} for _ in range(parallel)]
    visible = os.environ.get(VISIBLE)
    devices = visible.split(",")[: device_count()] if visible else [str(n) for n in range(device_count())]
    each = launch.processes or max(1, len(devices) // parallel)
    if each * parallel > len(devices):
        raise UserError(
            f"reproduce.parallel {parallel}: that many experiments of {each} processes need "
            f"{each * parallel} GPUs and this host has {len(devices)}"
        )
    return [{VISIBLE: ",".join(devices[n * each : (n + 1) * each])} for n in range(parallel)]


def run_in_parallel(
    config: RunConfig,
    experiments: Sequence[Experiment],
    folder: Path,
    on_progress: Callable[[int], OnProgress],
    stages: StageFunctions,
) -> list[ExperimentOutcome]:
    """Run every experiment, reproduce.parallel at a time; returns the outcomes in the same order.

    Args:
        config: configuration of the comparison.
        experiments: its experiments.
        folder: contains the configuration, progress and outcomes of the processes.
        on_progress: returns the progress callback of the experiment with a given number.
        stages: the stages of an experiment.

    Raises:
        StopRequested: an experiment was asked to stop; the others are then ended too.
        UserError: there are not enough devices.
    """
    free = device_shares(config)
    if config.evaluate.trains_classifier:
        _train_classifier(config)
    file = folder / "config.yaml"
    write_text(file, dump_yaml(_with_thread_share(config)))
    outcomes: dict[int, ExperimentOutcome] = {}
    running: list[_ExperimentProcess] = []
    waiting = list(range(len(experiments)))
    try:
        while waiting or running:
            while waiting and free:
                number, devices = waiting.pop(0), free.pop(0)
                own = folder / experiments[number].name
                process = _start(experiments[number], own, file, devices, stages.entry_point)
                running.append(_ExperimentProcess(number, own, process, devices))
            time.sleep(POLL_SECONDS)
            for child in list(running):
                report = on_progress(child.number)
                if progress := read_json(child.folder / "progress.json"):
                    report(progress["parts"], progress["message"])
                if child.process.poll() is not None:
                    outcomes[child.number] = _read_outcome(child.folder)
                    report(PROGRESS_PARTS, experiments[child.number].title)
                    running.remove(child)
                    free.append(child.devices)
    finally:
        _terminate([child.process for child in running])
    return [outcomes[number] for number in range(len(experiments))]


def _train_classifier(config: RunConfig) -> None:
    """Train the feature classifier once; otherwise each parallel experiment would train its own."""
    with cpu_threads(world(config.launch)[1]):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        manifest = load_manifest(config.data.root, config.data.name)
        settings = config.evaluate.model_copy(update={"features": "classifier"})
        open_extractor(settings, config.data.root, manifest, device, _ignore_progress)


def _ignore_progress(step: int, steps: int, loss: float) -> None:
    """Discard the progress of the classifier's training."""


def _with_thread_share(config: RunConfig) -> RunConfig:
    """Divide the cores among the experiments, unless launch.threads is set or GPUs are used."""
    if config.launch.threads or config.launch.kind != "local" or device_count():
        return config
    _, threads = world(config.launch)
    share = max(1, threads // config.reproduce.parallel)
    return config.model_copy(update={"launch": config.launch.model_copy(update={"threads": share})})


def _start(
    experiment: Experiment, folder: Path, config_file: Path, devices: dict[str, str], entry_point: str
) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("ended.json", "progress.json"):
        folder.joinpath(name).unlink(missing_ok=True)
    arguments = [str(config_file), experiment.name, str(folder), entry_point]
    command = [sys.executable, "-m", "fm_core.reproduce.parallel", *arguments]
    # The terminal's Ctrl-C reaches only the comparison, which then ends its experiments.
    return spawn_detached(command, folder / "output.log", devices)


def _read_outcome(folder: Path) -> ExperimentOutcome:
    """The outcome written by a process that has exited. Raises StopRequested if it was asked to stop."""
    outcome = read_json(folder / "ended.json")
    if outcome is None:
        return ExperimentOutcome(None, f"its process was killed (log: {folder / 'output.log'})")
    if outcome["state"] == "stopped":
        raise StopRequested(outcome["error"])
    return ExperimentOutcome(outcome.get("record"), outcome.get("error", ""), outcome.get("trace", ""))


def _terminate(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to end their jobs, and kill those that do not; the next run attaches to their jobs."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + TERMINATION_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(file: str, name: str, folder: Path, entry_point: str) -> None:
    """Run one experiment; its outcome is written to <folder>/ended.json."""
    signal.signal(signal.SIGTERM, _interrupt)
    # If the comparison is killed, so are its experiments. Their jobs continue; the next run attaches to them.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    config = load_config(file)
    (experiment,) = (experiment for experiment in experiments_of(config) if experiment.name == name)
    reported_at = 0.0

    def report(parts: int, message: str) -> None:
        nonlocal reported_at
        if time.monotonic() - reported_at > PROGRESS_SECONDS:
            reported_at = time.monotonic()
            write_json(folder / "progress.json", {"parts": parts, "message": message})

    outcome: dict[str, Any]
    try:
        stages = StageFunctions.load(entry_point)
        record = run_experiment(experiment, config.reproduce, report, stages)
        outcome = {"state": "done", "record": record}
    except (StopRequested, KeyboardInterrupt) as stop:
        outcome = {"state": "stopped", "error": str(stop) or "stopped; run it again to continue"}
    except Exception as error:
        failure = ExperimentOutcome.of_error(error, traceback.format_exc())
        outcome = {"state": "failed", "error": failure.error, "trace": failure.traceback}
    write_json(folder / "ended.json", outcome)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
