"""Node agent: runs the rank group of one host, and ends it on request or when the host is cut off.

`python -m fm_core.launch.node_agent HOST` reads its node specification from the ssh connection
(ssh_tunnel.sh), or from the environment under Slurm. `python -m fm_core.launch.node_agent --end JOB` ends the
remaining processes of a job on this host.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from fm_core.errors import LeaseLostError, Outcome, UserError
from fm_core.launch.exit_records import (
    print_exit_record,
    read_exit_records,
    remove_exit_records,
    write_exit_record,
)
from fm_core.launch.job import Job, end_processes, submitted, successor
from fm_core.launch.launcher import job_config_file, worker_command, worker_environment
from fm_core.launch.node_spec import NodeSpec, interface_towards, meeting_address
from fm_core.launch.rank_group import LOOPBACK_INTERFACE, rank_group_command
from fm_core.launch.worker_main import ADOPTION_SECONDS, PR_SET_PDEATHSIG
from fm_core.run.lease import Lease, holder_name
from fm_core.run.resource_limits import OomCounter
from fm_core.storage.atomic_files import write_json, write_text
from fm_core.storage.retries import with_retries

NODE_SPEC_VARIABLE, HOSTS_VARIABLE = "FM_NODE_SPEC", "FM_HOSTS"
SILENCE_SECONDS = 20.0
"""A host that receives no heartbeat for this many seconds considers itself cut off."""
GRACE_SECONDS = 22.0
"""Seconds in which ranks must save and exit; less than their supervisor waits."""
LOST_GRACE_SECONDS = 5.0
"""The same after a host was lost, when nothing can be saved any more."""


@dataclass(frozen=True)
class Place:
    """Directories where the ranks of this host write their records and logs."""

    control: Path
    logs: Path | None
    """None if this host has no access to the run directory; the ranks then write to the job's log."""
    config_file: Path


class Uplink:
    """Connection from the submitting host; the ranks may continue while heartbeats arrive."""

    def __init__(self, stream: TextIO | None) -> None:
        self._heard_at, self._last, self._closed = time.monotonic(), "", False
        self._listens = stream is not None
        signal.signal(signal.SIGTERM, self._close)
        signal.signal(signal.SIGHUP, self._close)
        if stream:
            threading.Thread(target=self._listen, args=(stream,), daemon=True).start()

    def grace(self) -> float | None:
        """Seconds in which the ranks must exit; None while they may continue."""
        silent = self._listens and time.monotonic() - self._heard_at > SILENCE_SECONDS
        if silent or self._last == "lost":
            return LOST_GRACE_SECONDS
        return GRACE_SECONDS if self._closed else None

    def _listen(self, stream: TextIO) -> None:
        for line in stream:
            self._heard_at, self._last = time.monotonic(), line.strip()
        self._closed = True

    def _close(self, number: int, frame: FrameType | None) -> None:
        self._closed = True


def main(arguments: list[str]) -> int:
    """Run a node; returns 0: done, 3: stopped on request, 2: user error, 1: anything else."""
    if arguments[0] == "--end":
        end_processes(arguments[1], LOST_GRACE_SECONDS, spare=_lineage())
        return 0
    received = _receive(arguments[0])
    if received is None:
        return 0
    spec, host, stream = received
    with _place(spec) as place:
        try:
            _check(spec, host, place)
            if spec.job.kind == "slurm" and _is_first(spec.job, host):
                spec = with_retries(partial(_begin_attempt, spec, place.control), str(place.control))
            code = _run(spec, host, place, stream)
        except UserError as error:
            job, rank = spec.job, _ranks(spec.job, host)[0]
            write_exit_record(place.control, job.stage, job.id, rank, Outcome.REFUSED, str(error))
            code = Outcome.REFUSED.exit_code
        except LeaseLostError as error:
            print(error, flush=True)
            code = Outcome.LEASE_LOST.exit_code
        end_processes(spec.job.id, LOST_GRACE_SECONDS, spare=_lineage())
        if place.logs is None:
            for record in read_exit_records(place.control, spec.job).values():
                print_exit_record(record)
    return code


def _receive(host: str) -> tuple[NodeSpec, str, TextIO | None] | None:
    """The specification, this host's name in it, and the connection; None if it was closed first."""
    text = os.environ.pop(NODE_SPEC_VARIABLE, None)
    if text is None:
        text = sys.stdin.readline()
        return (NodeSpec.model_validate_json(text), host, sys.stdin) if text else None
    spec = NodeSpec.model_validate_json(text)
    names = os.environ[HOSTS_VARIABLE].split()
    each = spec.job.processes // len(names)
    chosen = {"hosts": dict.fromkeys(names, each), "slurm": int(os.environ["SLURM_JOB_ID"])}
    job = spec.job.model_copy(update=chosen)
    return spec.model_copy(update={"job": job}), os.environ["SLURMD_NODENAME"], None


def _begin_attempt(spec: NodeSpec, control: Path) -> NodeSpec:
    """Record the hosts that Slurm has allocated; a repeated attempt takes the lease with a new epoch.

    Slurm requeues a job when it loses a node. That node may be cut off only from Slurm, so that its ranks
    continue; they then detect the new epoch in the lease.

    Raises LeaseLostError if another job has taken the directory.
    """
    job, lease = spec.job, Lease(control / "lock")
    with lease.guard():
        if holder := successor(job, control):
            raise LeaseLostError(
                f"{control} was taken over by {holder_name(holder)}; Slurm job {job.slurm} ends"
            )
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            epoch = lease.take_for(f"Slurm job {job.slurm}", job=job.id, stage=job.stage)
            job = job.model_copy(update={"epoch": epoch})
        write_json(control / "job.json", job.model_dump())
    return spec.model_copy(update={"job": job})


@contextmanager
def _place(spec: NodeSpec) -> Generator[Place]:
    control, logs = Path(spec.control), Path(spec.logs)
    if _belongs_to(control, spec.job):
        yield Place(control, logs, job_config_file(control, logs, spec.job.stage))
        return
    with tempfile.TemporaryDirectory(prefix="fm-") as name:
        place = Place(Path(name), None, Path(name) / "config.yaml")
        write_text(place.config_file, spec.config)
        write_json(place.control / "job.json", spec.job.model_dump())
        yield place


def _belongs_to(control: Path, job: Job) -> bool:
    """Whether this host has access to the job's control directory; Slurm may start before job.json exists."""
    deadline = time.monotonic() + ADOPTION_SECONDS
    while control.is_dir():
        with suppress(OSError, UserError):  # a file server that does not answer at the moment
            record = submitted(control)
            if record and record.id == job.id:
                return True
        if job.kind != "slurm" or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return False


def _check(spec: NodeSpec, host: str, place: Place) -> None:
    first = _is_first(spec.job, host)
    if not Path(spec.folder).is_dir():
        raise UserError(f"{host} has no directory {spec.folder}; start from one that all hosts have")
    if first and place.logs is None:
        raise UserError(
            f"run.root: {host} has no access to {spec.control}, which the first host needs: start there, or "
            "set a path that it shares with this host"
        )
    for key, mark in spec.job.marks.items():
        if not Path(mark).exists():
            raise UserError(f"{key}: {host} has no access to {Path(mark).parent}; set a URL or a shared path")
    if first:
        _check_port(meeting_address(list(spec.job.hosts)), spec.port, host)


def _check_port(address: str, port: int, host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise UserError(f"launch.port: {port} of {host} cannot be used ({error.strerror})") from None


def _run(spec: NodeSpec, host: str, place: Place, stream: TextIO | None) -> int:
    ranks = _ranks(spec.job, host)
    # A job that Slurm requeued has left records of its earlier attempt.
    remove_exit_records(place.control, spec.job.stage, ranks)
    oom_counter = OomCounter()
    agent = subprocess.Popen(
        _rank_group(spec, host, place),
        stdin=subprocess.DEVNULL,
        env=_environment(spec, host, place),
        cwd=spec.folder,
        preexec_fn=_die_with_agent,
    )
    uplink = Uplink(stream)
    while agent.poll() is None and uplink.grace() is None:
        time.sleep(0.1)
    end_processes(spec.job.id, uplink.grace() or GRACE_SECONDS, spare=_lineage())
    agent.wait()
    records = read_exit_records(place.control, spec.job)
    if kills := oom_counter.new_kills():
        message = f"was killed; the kernel of {host} ended {kills} process(es) for lack of memory meanwhile"
        for rank in set(ranks) - records.keys():
            write_exit_record(
                place.control,
                spec.job.stage,
                spec.job.id,
                rank,
                Outcome.FAILED,
                f"out of memory: it {message}",
            )
    kinds = {records[rank]["kind"] if rank in records else "killed" for rank in ranks}
    if kinds == {Outcome.DONE.record}:
        return Outcome.DONE.exit_code
    stopped = kinds <= {Outcome.DONE.record, Outcome.STOPPED.record}
    return (Outcome.STOPPED if stopped else Outcome.FAILED).exit_code


def _rank_group(spec: NodeSpec, host: str, place: Place) -> list[str]:
    hosts, ranks = list(spec.job.hosts), _ranks(spec.job, host)
    return rank_group_command(
        worker_command(spec.job.stage, spec.worker, place.config_file),
        len(ranks),
        first=ranks[0],
        world=spec.job.processes,
        meet=f"{meeting_address(hosts) if host == hosts[0] else hosts[0]}:{spec.port}",
        listen=host == hosts[0],
    )


def _environment(spec: NodeSpec, host: str, place: Place) -> dict[str, str]:
    hosts = list(spec.job.hosts)
    variables = spec.environment | worker_environment(
        spec.job, place.control, place.logs, spec.job.hosts[host]
    )
    # A host's own name often resolves to its loopback interface, where no other host can reach gloo.
    interface = interface_towards(hosts[0] if host != hosts[0] else hosts[-1])
    if len(hosts) == 1:
        variables |= LOOPBACK_INTERFACE
    elif interface:
        variables.setdefault("GLOO_SOCKET_IFNAME", interface)
    return {**os.environ, **variables}


def _die_with_agent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_first(job: Job, host: str) -> bool:
    return host == next(iter(job.hosts))


def _ranks(job: Job, host: str) -> range:
    names = list(job.hosts)
    first = sum(job.hosts[name] for name in names[: names.index(host)])
    return range(first, first + job.hosts[host])


def _lineage() -> frozenset[int]:
    """Process ids of this process and its ancestors."""
    return frozenset({os.getpid(), *(process.pid for process in psutil.Process().parents())})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
