"""SSH launcher: pdsh keeps a connection to each host of the hostfile, where a node agent runs a rank group.

A broken connection ends the job on both sides: ssh notices within 20 s and the other connections are closed;
the host that was cut off receives no heartbeat and ends its ranks.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fm_core
from fm_core.errors import UnreachableError, UserError
from fm_core.launch.detached import spawn_detached
from fm_core.launch.exit_records import collect_exit_records, open_log
from fm_core.launch.hostfile import read_logins
from fm_core.launch.job import (
    GRACE_SECONDS,
    JOB_VARIABLE,
    Job,
    agent_lives,
    end_processes,
    kill,
    processes_of,
    tunnel_mark,
)
from fm_core.launch.launcher import JobSpec, JobStatus, with_agent
from fm_core.launch.node_agent import LOST_GRACE_SECONDS, NODE_SPEC_VARIABLE, SILENCE_SECONDS
from fm_core.launch.node_spec import node_spec_of, portable_environment, remove_visibility_marks
from fm_core.run.stop_file import request_stop

FENCE_SECONDS = SILENCE_SECONDS + LOST_GRACE_SECONDS + 10.0
"""Seconds after which no process of a job is left even on an unreachable host."""
SSH_FAILED = 255
"""Exit status of ssh when it cannot connect, the connection breaks or the remote side is killed."""
CANNOT_RUN = (126, 127)
"""Exit statuses of a shell for a program that cannot be run."""

_TUNNEL = Path(__file__).with_name("ssh_tunnel.sh")
_REACHED = "fm-reached"
PROGRAMS: dict[str, str] = {"pdsh": "pdsh", "ssh": "openssh-client"}
"""Programs that are called on this host, with the package of each."""
_SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
LOGINS_VARIABLE = "FM_LOGINS"
"""Variable with USER@HOST of the hosts where another user logs in, separated by spaces."""
_SSH_TO = """host=$1 command=$2; shift 2
for login in $FM_LOGINS; do [ "${login#*@}" != "$host" ] || host=$login; done
exec ssh "$@" "$host" "$command" """
"""Shell script for one connection, with the login of its host."""


def submit(spec: JobSpec) -> Job:
    """Open a connection to each host. Raises UnreachableError for unreachable hosts."""
    hosts = list(spec.job.hosts)
    logins = read_logins(spec.config.launch.hostfile or "")
    spec = replace(spec, job=spec.job.model_copy(update={"logins": tuple(logins.values())}))
    _require(hosts, spec.job.logins)
    node_spec = node_spec_of(spec, portable_environment())
    open_log(node_spec.job)
    identifier = spec.job.id
    tunnel = ["sh", str(_TUNNEL), "%h", str(spec.control), identifier, node_command(identifier, "%h")]
    variables = {JOB_VARIABLE: tunnel_mark(identifier), LOGINS_VARIABLE: " ".join(node_spec.job.logins)}
    with _in_memory(node_spec.model_dump_json()) as file:
        variables[NODE_SPEC_VARIABLE] = str(file)
        log = Path(spec.job.log)
        process = spawn_detached(_pdsh(hosts, tunnel), log, variables, descriptors=(file,))
    return with_agent(node_spec.job, process.pid)


@contextmanager
def _in_memory(text: str) -> Generator[int]:
    """Descriptor of an anonymous file that contains one line.

    The specification contains the environment, which may include credentials, so it is not written to a file
    or a command line. An environment variable would be limited to 128 KiB.
    """
    file = os.memfd_create("node-spec")
    try:
        with os.fdopen(os.dup(file), "w", encoding="utf-8") as stream:
            stream.write(f"{text}\n")
        yield file
    finally:
        os.close(file)


def poll(job: Job) -> JobStatus:
    """Whether pdsh runs; it exits when all its connections have ended."""
    return JobStatus(agent_lives(job))


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Close the connections; each host then asks its ranks to save and exit, and kills those that remain."""
    request_stop(control)
    deadline = time.monotonic() + grace
    while (left := processes_of(job)) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill(left)


def collect(job: Job, control: Path) -> list[str]:
    """Collect exit records of hosts without access to the control directory; return which hosts were lost."""
    _end_here(job)
    collect_exit_records(job, control)
    remove_visibility_marks(job)
    record = control / f"{job.id}.lost"
    lost: list[str] = []
    for line in record.read_text(encoding="utf-8", errors="replace").splitlines() if record.exists() else []:
        host, code, *message = line.split()
        if int(code) == SSH_FAILED:
            reason = " ".join(message) or "all its processes were killed"
            lost.append(f"host {host} was lost ({reason})")
        elif int(code) in CANNOT_RUN:
            lost.append(f"host {host} cannot run {sys.executable}")
    return lost


def cleanup(job: Job) -> None:
    """End remaining processes on the job's hosts; unreachable hosts end theirs on their own."""
    _end_here(job)
    command, left = node_command(job.id, "--end", job.id), dict.fromkeys(job.hosts, "")
    deadline = time.monotonic() + FENCE_SECONDS
    while (left := unreached(left, job.logins, command)) and time.monotonic() < deadline:
        time.sleep(1.0)


def _end_here(job: Job) -> None:
    # When the connections are closed, the node agents on all hosts end.
    end_processes(tunnel_mark(job.id), GRACE_SECONDS)
    end_processes(job.id, GRACE_SECONDS)


def unreached(hosts: Iterable[str], logins: Sequence[str] = (), command: str = "true") -> dict[str, str]:
    """Hosts on which a command failed over ssh, with the message of ssh or of the login shell.

    `logins` contains USER@HOST for hosts where another user logs in.
    """
    output: dict[str, list[str]] = {host: [] for host in hosts}
    # The login shell there may be csh or fish, so it gets only quoted words.
    remote = shlex.join(["sh", "-c", f"{{ {command}; }} </dev/null && echo {_REACHED}"])
    done = subprocess.run(
        _pdsh(output, ["sh", "-c", _SSH_TO, "ssh", "%h", remote, *_SSH_OPTIONS]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, LOGINS_VARIABLE: " ".join(logins)},
    )
    # pdsh omits a domain that is common to all hosts.
    labels = {host.partition(".")[0]: host for host in output} | {host: host for host in output}
    for line in done.stdout.splitlines():
        label, _, text = line.partition(": ")
        if label in labels:
            output[labels[label]].append(text.strip())
    return {host: " ".join(lines) for host, lines in output.items() if lines[-1:] != [_REACHED]}


def node_command(job: str, *arguments: str) -> str:
    """The command of a node agent as one string for a remote shell."""
    return shlex.join(node_arguments(job, *arguments))


def node_arguments(job: str, *arguments: str) -> list[str]:
    """The command of a node agent, with the same Python and the same code as here."""
    code = Path(fm_core.__file__).parents[1]
    path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
    python = [sys.executable, "-m", "fm_core.launch.node_agent"]
    return ["env", f"{JOB_VARIABLE}={job}", f"PYTHONPATH={path}", *python, *arguments]


def _require(hosts: list[str], logins: Sequence[str]) -> None:
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            raise UserError(f"launch.kind ssh: {program} is not installed on this host; install {package}")
    for host, message in unreached(hosts, logins).items():
        raise UnreachableError(
            f"launch.hostfile: {host} cannot be reached by ssh without a password "
            f"({message or 'it did not answer'}); fix that or remove the host from the file"
        )


def _pdsh(hosts: Iterable[str], command: list[str]) -> list[str]:
    """The pdsh command that runs a local command for all hosts in parallel; `%h` in it is the host."""
    names = list(hosts)
    escaped = [word.replace("%", "%%").replace("%%h", "%h") for word in command]
    return ["pdsh", "-S", "-R", "exec", "-f", str(len(names)), "-w", ",".join(names), *escaped]
