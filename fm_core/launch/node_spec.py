"""Node specification: what each host of a job runs, and the rendezvous of the hosts."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from fm_core.config import Section, dump_yaml
from fm_core.launch.job import Job
from fm_core.launch.launcher import JobSpec
from fm_core.launch.rank_group import LOOPBACK, PREFECT_SECRETS
from fm_core.run.directory import RunDirectory
from fm_core.storage.local_paths import local_path

FIRST_PORT, PORTS = 20_000, 10_000
"""Below the range that Linux uses for outgoing connections."""

DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables that select devices of this host; they are not valid on another host."""
# PYTHONPATH is part of the command (ssh.py).
_HOST_VARIABLES = {
    *("HOME", "HOSTNAME", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOGNAME", "MAIL", "OLDPWD", "PWD", "PYTHONPATH"),
    *("SHELL", "SHLVL", "TERM", "TMPDIR", "USER", "_"),
    *PREFECT_SECRETS,
    *DEVICES,
}
_SESSION_PREFIXES = ("DBUS_", "DISPLAY", "SSH_", "XDG_")


class NodeSpec(Section):
    """Sent as one line of JSON. It contains the environment, so it never appears on a command line."""

    job: Job
    worker: str
    """Entry point of a rank, "module:function"."""
    config: str
    """The configuration, as YAML."""
    control: str
    logs: str
    folder: str
    """Working directory; relative paths in the configuration start there."""
    port: int
    """Rendezvous port on the first host."""
    environment: dict[str, str]


def node_spec_of(spec: JobSpec, environment: dict[str, str]) -> NodeSpec:
    """Build the node specification of a job, and create the marker files that every host must see."""
    return NodeSpec(
        job=spec.job.model_copy(update={"marks": _create_marks(spec)}),
        worker=spec.worker,
        config=dump_yaml(spec.config),
        control=str(spec.control),
        logs=str(spec.logs),
        folder=str(Path.cwd()),
        port=spec.config.launch.port or FIRST_PORT + int(spec.job.id, 16) % PORTS,
        environment=environment,
    )


def portable_environment() -> dict[str, str]:
    """The environment variables of this process, without those of this host or this login."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _HOST_VARIABLES and not name.startswith(_SESSION_PREFIXES)
    }


def remove_visibility_marks(job: Job) -> None:
    """Remove the marker files of a job."""
    for mark in job.marks.values():
        Path(mark).unlink(missing_ok=True)


def interface_towards(host: str) -> str | None:
    """Name of this host's network interface on the route to another host; None if there is none."""
    return _interface_of(_address_towards(host))


def meeting_address(hosts: list[str]) -> str:
    """The address on which the store of the ranks listens on this host, the first of a job.

    Other hosts connect to the name of this host, so it is the address of that name. If the name resolves to
    the loopback interface here, as on Debian, it is the local address on the route to the last host; with one
    host it is the loopback interface.
    """
    if len(hosts) == 1:
        return LOOPBACK
    named: list[str] = []
    with suppress(OSError):
        addresses = socket.getaddrinfo(hosts[0], None, type=socket.SOCK_STREAM)
        named = [str(address[0]) for *_, address in addresses]
    for address in named:
        if _interface_of(address) not in (None, "lo"):
            return address
    towards = _address_towards(hosts[-1])
    # All hosts are on this machine.
    return named[0] if towards == LOOPBACK and named else towards or "0.0.0.0"


def _address_towards(host: str) -> str | None:
    try:
        family, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _interface_of(own_address: str | None) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own_address for address in addresses):
            return name
    return None


def _create_marks(spec: JobSpec) -> dict[str, str]:
    run = RunDirectory(spec.config)
    checkpoints, samples = ("train.checkpoint_root", run.checkpoints), ("sample.root", run.samples)
    # Intermediate results of an evaluation are stored next to the samples.
    roots = {"train": checkpoints, "sample": samples, "evaluate": samples}
    if spec.config.train.checkpoint_root:
        roots["preflight"] = checkpoints
    if spec.job.stage not in roots:
        return {}
    key, root = roots[spec.job.stage]
    folder = local_path(root)
    if folder is None:
        return {}
    mark = folder.resolve() / f".{spec.job.id}.seen"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return {key: str(mark)}
