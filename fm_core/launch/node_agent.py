"""Node agent: runs one torchrun on each host of a job, and ends it on request or when the host is cut off.

`python -m fm_core.launch.node_agent HOST` reads its node spec from the connection that ssh holds open
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
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import psutil

from fm_core.errors import Outcome, UserError
from fm_core.launch.exit_records import print_exit_record
from fm_core.launch.job import Job, end_processes, submitted
from fm_core.launch.launcher import worker_environment
from fm_core.launch.node_spec import NodeSpec, interface_towards
from fm_core.launch.worker_main import ADOPTION_SECONDS, PR_SET_PDEATHSIG
from fm_core.storage.atomic_files import read_json, write_json, write_text

NODE_SPEC_VARIABLE, HOSTS_VARIABLE = "FM_ORDER", "FM_HOSTS"
SILENCE_SECONDS = 20.0
"""A host that hears no beat for so long counts itself as cut off."""
GRACE_SECONDS = 22.0
"""How long ranks may take to save and end; less than their supervisor waits."""
LOST_GRACE_SECONDS = 5.0
"""The same where a host is lost: nothing can be saved any more."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of this host leave their records."""

    control: Path
    logs: Path | None
    """None where the run directory is out of sight: the ranks then speak to the job's log."""
    config_file: Path


class Uplink:
    """The line to the submitting host: the ranks may go on while beats come."""

    def __init__(self, stream: TextIO | None) -> None:
        self._heard, self._last, self._closed = time.monotonic(), "", False
        self._listens = stream is not None
        signal.signal(signal.SIGTERM, self._close)
        signal.signal(signal.SIGHUP, self._close)
        if stream:
            threading.Thread(target=self._listen, args=(stream,), daemon=True).start()

    def grace(self) -> float | None:
        """Seconds in which the ranks must end; None while they may go on."""
        silent = self._listens and time.monotonic() - self._heard > SILENCE_SECONDS
        if silent or self._last == "lost":
            return LOST_GRACE_SECONDS
        return GRACE_SECONDS if self._closed else None

    def _listen(self, stream: TextIO) -> None:
        for word in stream:
            self._heard, self._last = time.monotonic(), word.strip()
        self._closed = True

    def _close(self, number: int, frame: FrameType | None) -> None:
        self._closed = True


def main(words: list[str]) -> int:
    """Do what the module's first lines say; 0 done, 3 stopped on request, 2 refused, 1 anything else."""
    if words[0] == "--end":
        end_processes(words[1], LOST_GRACE_SECONDS, spare=_lineage())
        return 0
    ordered = _ordered(words[0])
    if ordered is None:
        return 0
    order, host, stream = ordered
    with _place(order) as place:
        try:
            _check(order, host, place)
            if order.job.kind == "slurm" and _is_first(order.job, host):
                # Only now is it known which hosts Slurm has chosen.
                write_json(place.control / "job.json", order.job.model_dump())
            code = _run(order, host, place, stream)
        except UserError as error:
            rank = _ranks(order.job, host)[0]
            _write_end(order.job, place, rank, str(error))
            code = Outcome.REFUSED.exit_code
        end_processes(order.job.id, LOST_GRACE_SECONDS, spare=_lineage())
        if place.logs is None:
            for end in _ends(order.job, place).values():
                print_exit_record(end)
    return code


def _ordered(host: str) -> tuple[NodeSpec, str, TextIO | None] | None:
    """The order, this host's name in it, and the line; None where the line gave no order."""
    text = os.environ.pop(NODE_SPEC_VARIABLE, None)
    if text is None:
        text = sys.stdin.readline()
        return (NodeSpec.model_validate_json(text), host, sys.stdin) if text else None
    order = NodeSpec.model_validate_json(text)
    names = os.environ[HOSTS_VARIABLE].split()
    each = order.job.processes // len(names)
    chosen = {"hosts": dict.fromkeys(names, each), "slurm": int(os.environ["SLURM_JOB_ID"])}
    job = order.job.model_copy(update=chosen)
    return order.model_copy(update={"job": job}), os.environ["SLURMD_NODENAME"], None


@contextmanager
def _place(order: NodeSpec) -> Generator[Place]:
    control, logs = Path(order.control), Path(order.logs)
    if _knows(control, order.job):
        yield Place(control, logs, logs / f"{order.job.stage}.yaml")
        return
    with tempfile.TemporaryDirectory(prefix="fm-") as name:
        place = Place(Path(name), None, Path(name) / "config.yaml")
        write_text(place.config_file, order.config)
        write_json(place.control / "job.json", order.job.model_dump())
        yield place


def _knows(control: Path, job: Job) -> bool:
    """Whether a control directory is in sight and of this job, which Slurm may start before it is noted."""
    deadline = time.monotonic() + ADOPTION_SECONDS
    while control.is_dir():
        record = submitted(control)
        if record and record.id == job.id:
            return True
        if job.kind != "slurm" or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return False


def _check(order: NodeSpec, host: str, place: Place) -> None:
    first = _is_first(order.job, host)
    if not Path(order.folder).is_dir():
        raise UserError(f"{host} has no directory {order.folder}; start from one that all hosts have")
    if first and place.logs is None:
        raise UserError(
            f"run.root: {host} does not see {order.control}; the first host must: start from it, or name a "
            "path that it shares with this host"
        )
    for key, mark in order.job.marks.items():
        if not Path(mark).exists():
            raise UserError(
                f"{key}: {host} does not see {Path(mark).parent}; name a URL or a path that all hosts share"
            )
    if first:
        _check_port(order.port, host)


def _check_port(port: int, host: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"launch.port: {port} of {host} cannot be used ({error.strerror})") from None


def _run(order: NodeSpec, host: str, place: Place, stream: TextIO | None) -> int:
    ranks = _ranks(order.job, host)
    for rank in ranks:
        # A job that Slurm has queued again has left the words of its earlier life.
        _end_file(order.job, place, rank).unlink(missing_ok=True)
    agent = subprocess.Popen(
        _torchrun(order, host, place),
        stdin=subprocess.DEVNULL,
        env=_environment(order, host, place),
        cwd=order.folder,
        preexec_fn=_agent_signals,
    )
    line = Uplink(stream)
    while agent.poll() is None and line.grace() is None:
        time.sleep(0.1)
    if agent.poll() is None:
        started = psutil.Process(agent.pid).children()
        for rank in started:
            with suppress(psutil.NoSuchProcess):
                rank.terminate()
        if not started:
            # It still waits for the other hosts: there is nothing to save.
            agent.kill()
    end_processes(order.job.id, line.grace() or GRACE_SECONDS, spare=_lineage())
    agent.wait()
    ends = _ends(order.job, place)
    kinds = {ends[rank]["kind"] if rank in ends else "killed" for rank in ranks}
    if kinds == {Outcome.DONE.record}:
        return Outcome.DONE.exit_code
    stopped = kinds <= {Outcome.DONE.record, Outcome.STOPPED.record}
    return (Outcome.STOPPED if stopped else Outcome.FAILED).exit_code


def _torchrun(order: NodeSpec, host: str, place: Place) -> list[str]:
    hosts = list(order.job.hosts)
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={len(hosts)}", f"--node-rank={hosts.index(host)}"),
        *(f"--nproc-per-node={order.job.hosts[host]}", "--signals-to-handle=SIGINT"),
        *(f"--master-addr={hosts[0]}", f"--master-port={order.port}"),
        *("-m", order.module, str(place.config_file)),
    ]


def _environment(order: NodeSpec, host: str, place: Place) -> dict[str, str]:
    hosts = list(order.job.hosts)
    ours = worker_environment(order.job, place.control, place.logs, order.job.hosts[host])
    variables = {**order.environment, **ours}
    # A host's own name often leads to its loopback interface, where no other host can reach gloo.
    interface = interface_towards(hosts[0] if host != hosts[0] else hosts[-1])
    if interface:
        variables.setdefault("GLOO_SOCKET_IFNAME", interface)
    return {**os.environ, **variables}


def _agent_signals() -> None:
    # torchrun breaks down at a second SIGTERM, and Slurm sends several to all processes of a step: the ranks
    # hear of a stop from this node or from Slurm, and where the agent dies, from the kernel.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_first(job: Job, host: str) -> bool:
    return host == next(iter(job.hosts))


def _ranks(job: Job, host: str) -> range:
    names = list(job.hosts)
    first = sum(job.hosts[name] for name in names[: names.index(host)])
    return range(first, first + job.hosts[host])


def _end_file(job: Job, place: Place, rank: int) -> Path:
    return place.control / f"{job.stage}-{rank}.end.json"


def _ends(job: Job, place: Place) -> dict[int, dict[str, Any]]:
    records = (read_json(path) for path in place.control.glob(f"{job.stage}-*.end.json"))
    return {record["rank"]: record for record in records if record and record["job"] == job.id}


def _write_end(job: Job, place: Place, rank: int, message: str) -> None:
    record = {"job": job.id, "rank": rank, "kind": "user", "message": message}
    write_json(_end_file(job, place, rank), record)


def _lineage() -> frozenset[int]:
    """Numbers of this process and of those above it."""
    return frozenset({os.getpid(), *(process.pid for process in psutil.Process().parents())})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
