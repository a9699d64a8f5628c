"""Jobs of several processes: submit, poll, cancel.

A job is a torchrun agent in a session of its own and its ranks. It does not depend on whoever
submitted it: a supervisor that dies leaves it running, and the next one attaches. Every process of
a job carries its id in the environment, so that none is lost sight of.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil

from fm_core.config import LaunchSection, Section
from fm_core.run.files import read_json, write_json
from fm_core.run.lease import process_is

JOB_VARIABLE = "FM_JOB"
CONTROL_VARIABLE = "FM_CONTROL"
LOGS_VARIABLE = "FM_LOGS"
GRACE_SECONDS = 25.0
"""How long ranks may take to save and end after they were asked to stop; Prefect gives 30."""


class Job(Section):
    """The handle of a submitted job, kept in job.json."""

    id: str
    stage: str
    kind: Literal["local"] = "local"
    host: str
    pid: int
    created: float
    """Start of the agent, in seconds since 1970: pid and start together name one process."""
    processes: int
    threads: int
    log: str


def device_count() -> int:
    """GPUs of this host; asked of the driver's own tool's library through torch."""
    import torch

    return torch.cuda.device_count()


def world(launch: LaunchSection) -> tuple[int, int]:
    """Processes and threads of each, from the configuration and this machine."""
    gpus = device_count()
    processes = launch.processes or gpus or 2
    return processes, launch.threads or max(1, (os.cpu_count() or 1) // processes)


def submit(
    control: Path, logs: Path, stage: str, module: str, config_file: Path, launch: LaunchSection
) -> Job:
    """Start the ranks `python -m module config_file` and write the handle to control/job.json."""
    processes, threads = world(launch)
    identifier = uuid.uuid4().hex
    log = logs / f"{stage}.log"
    logs.parent.joinpath("STOP").unlink(missing_ok=True)
    for stale in ("STOP", *(path.name for path in control.glob(f"{stage}-*.end.json"))):
        control.joinpath(stale).unlink(missing_ok=True)
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*agent, f"--nproc-per-node={processes}", "-m", module, str(config_file)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(identifier, control, logs, threads),
        )
    job = Job(
        id=identifier,
        stage=stage,
        host=socket.gethostname(),
        pid=process.pid,
        created=psutil.Process(process.pid).create_time(),
        processes=processes,
        threads=threads,
        log=str(log),
    )
    write_json(control / "job.json", job.model_dump())
    return job


def submitted(control: Path) -> Job | None:
    """The job last submitted in a control directory, dead or alive."""
    record = read_json(control / "job.json")
    if record is None:
        return None
    record.pop("schema")
    return Job.model_validate(record)


def alive(job: Job) -> bool:
    """Whether the agent of a job runs."""
    _reap(job.pid)
    return process_is(job.pid, job.created)


def processes_of(job: Job) -> list[psutil.Process]:
    """Every live process of a job on this host, agent and orphans included."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(JOB_VARIABLE) == job.id:
                found.append(process)
        except psutil.Error:
            continue
    return found


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and end, wait until no process of the job is left, kill what stays."""
    control.joinpath("STOP").touch()
    if alive(job):
        with suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (left := processes_of(job)) and time.monotonic() < deadline:
        _reap(job.pid)
        time.sleep(0.1)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)


def _environment(identifier: str, control: Path, logs: Path, threads: int) -> dict[str, str]:
    environment = {
        **os.environ,
        JOB_VARIABLE: identifier,
        CONTROL_VARIABLE: str(control.resolve()),
        LOGS_VARIABLE: str(logs.resolve()),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "1",
        # One host: the loopback interface serves, and nothing listens to the outside.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if device_count() == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _reap(pid: int) -> None:
    # An agent that is our own child stays a zombie until it is waited for.
    try:
        os.waitpid(pid, os.WNOHANG)
    except (ChildProcessError, OSError):
        return
