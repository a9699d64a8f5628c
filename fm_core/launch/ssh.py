"""Jobs over ssh: pdsh keeps a line to each host of the hostfile, where a node runs one torchrun.

A line that breaks ends the job on both of its sides: ssh notices within 20 s and the other lines end;
the host that was cut off hears no beat and ends its ranks.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import fm_core
from fm_core.errors import UnreachableError, UserError
from fm_core.launch.exit_records import collect_exit_records, open_log
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

FENCE_SECONDS = SILENCE_SECONDS + LOST_GRACE_SECONDS + 10.0
"""After so long nothing of a job is left even on a host that cannot be reached."""
BROKEN = 255
"""What ssh ends with when it cannot connect, the connection breaks or the far side is killed."""
NO_COMMAND = (126, 127)
"""What a shell says of a program that it cannot run."""

_LINE = Path(__file__).with_name("ssh_tunnel.sh")
_REACHED = "fm-reached"
PROGRAMS: dict[str, str] = {"pdsh": "pdsh", "ssh": "openssh-client"}
"""What is called on this host, by the package that brings it."""
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def submit(task: JobSpec) -> Job:
    """Open a line to each host. Raises UserError for hosts that cannot be reached."""
    hosts = list(task.job.hosts)
    _require(hosts)
    order = node_spec_of(task, portable_environment())
    open_log(order.job)
    line = ["sh", str(_LINE), "%h", str(task.control), task.job.id, node_command(task.job.id, "%h")]
    with Path(task.job.log).open("ab") as output:
        process = subprocess.Popen(
            _pdsh(hosts, line),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # The order holds the environment, and that may hold credentials: no file, no command line.
            env={
                **os.environ,
                JOB_VARIABLE: tunnel_mark(task.job.id),
                NODE_SPEC_VARIABLE: order.model_dump_json(),
            },
        )
    return with_agent(order.job, process.pid)


def poll(job: Job) -> JobStatus:
    """Whether pdsh runs: it ends when all its lines have ended."""
    return JobStatus(agent_lives(job))


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """End the lines: each host asks its ranks to save and end, and kills what stays."""
    control.joinpath("STOP").touch()
    deadline = time.monotonic() + grace
    while (left := processes_of(job)) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill(left)


def collect(job: Job, control: Path) -> list[str]:
    """Gather the words of hosts that do not see the control directory; say which hosts were lost."""
    _end_here(job)
    collect_exit_records(job, control)
    remove_visibility_marks(job)
    record = control / f"{job.id}.lost"
    lost: list[str] = []
    for line in record.read_text().splitlines() if record.exists() else []:
        host, code, *words = line.split()
        if int(code) == BROKEN:
            said = " ".join(words) or "all its processes were killed"
            lost.append(f"host {host} was lost ({said})")
        elif int(code) in NO_COMMAND:
            lost.append(f"host {host} cannot run {sys.executable}")
    return lost


def cleanup(job: Job) -> None:
    """End what is left on the job's hosts; wait for those that cannot be reached to end by themselves."""
    _end_here(job)
    command, left = node_command(job.id, "--end", job.id), dict.fromkeys(job.hosts, "")
    deadline = time.monotonic() + FENCE_SECONDS
    while (left := unreached(left, command)) and time.monotonic() < deadline:
        time.sleep(1.0)


def _end_here(job: Job) -> None:
    # Where the lines end, so does what hangs on them, on this host as on the others.
    end_processes(tunnel_mark(job.id), GRACE_SECONDS)
    end_processes(job.id, GRACE_SECONDS)


def unreached(hosts: Iterable[str], command: str = "true") -> dict[str, str]:
    """Hosts on which a command could not be run over ssh, and what ssh said."""
    said: dict[str, list[str]] = {host: [] for host in hosts}
    asked = [*_SSH, "%h", f"{{ {command}; }} </dev/null && echo {_REACHED}"]
    done = subprocess.run(
        _pdsh(said, asked),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # pdsh leaves out a domain that all hosts share.
    labels = {host.partition(".")[0]: host for host in said} | {host: host for host in said}
    for line in done.stdout.splitlines():
        label, _, words = line.partition(": ")
        if label in labels:
            said[labels[label]].append(words.strip())
    return {host: " ".join(words) for host, words in said.items() if words[-1:] != [_REACHED]}


def node_command(job: str, *words: str) -> str:
    """The command of a node for a remote shell."""
    return shlex.join(node_words(job, *words))


def node_words(job: str, *words: str) -> list[str]:
    """The command of a node: the same Python and the same code as here."""
    code = Path(fm_core.__file__).parents[1]
    path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
    python = [sys.executable, "-m", "fm_core.launch.node_agent"]
    return ["env", f"{JOB_VARIABLE}={job}", f"PYTHONPATH={path}", *python, *words]


def _require(hosts: list[str]) -> None:
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            raise UserError(f"launch.kind ssh: there is no {program} on this host; install {package}")
    for host, words in unreached(hosts).items():
        raise UnreachableError(
            f"launch.hostfile: {host} cannot be reached by ssh without a password "
            f"({words or 'it did not answer'}); mend that or take it out of the file"
        )


def _pdsh(hosts: Iterable[str], command: list[str]) -> list[str]:
    """The command that runs a local command for each host at once; `%h` in it is the host."""
    names = list(hosts)
    escaped = [word.replace("%", "%%").replace("%%h", "%h") for word in command]
    return ["pdsh", "-S", "-R", "exec", "-f", str(len(names)), "-w", ",".join(names), *escaped]
