"""The order that every host of a job gets: what to run there, and how the hosts meet."""

import os
import socket
from pathlib import Path

import psutil

from fm_core.config import Section, dump_yaml
from fm_core.launch.job import Job
from fm_core.launch.launcher import JobSpec
from fm_core.run.directory import RunDirectory
from fm_core.storage.local_paths import local_path

FIRST_PORT, PORTS = 20_000, 10_000
"""Below the range that Linux gives to outgoing connections."""

DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""What of a host's devices a process may use: of another host they say nothing."""
# PYTHONPATH goes with the command (ssh.py).
_BOUND_TO_A_HOST = {
    *("HOME", "HOSTNAME", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOGNAME", "MAIL", "OLDPWD", "PWD", "PYTHONPATH"),
    *("SHELL", "SHLVL", "TERM", "TMPDIR", "USER", "_"),
    *DEVICES,
}
_BOUND_TO_A_SESSION = ("DBUS_", "DISPLAY", "SSH_", "XDG_")


class NodeSpec(Section):
    """One line of JSON; it holds the environment and so never stands on a command line."""

    job: Job
    module: str
    config: str
    """The configuration, as YAML."""
    control: str
    logs: str
    folder: str
    """Working directory; relative paths in the configuration begin there."""
    port: int
    """Where the hosts meet, on the first of them."""
    environment: dict[str, str]


def node_spec_of(task: JobSpec, environment: dict[str, str]) -> NodeSpec:
    """The order of a task; makes the marks that every host must see."""
    return NodeSpec(
        job=task.job.model_copy(update={"marks": _marks(task)}),
        module=task.module,
        config=dump_yaml(task.config),
        control=str(task.control),
        logs=str(task.logs),
        folder=str(Path.cwd()),
        port=task.config.launch.port or FIRST_PORT + int(task.job.id, 16) % PORTS,
        environment=environment,
    )


def portable_environment() -> dict[str, str]:
    """The variables of this process, without those that mean this host or this login."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _BOUND_TO_A_HOST and not name.startswith(_BOUND_TO_A_SESSION)
    }


def remove_visibility_marks(job: Job) -> None:
    """Remove the marks that every host had to see."""
    for mark in job.marks.values():
        Path(mark).unlink(missing_ok=True)


def interface_towards(host: str) -> str | None:
    """Name of the network interface of this host that leads to another; None where none does."""
    try:
        family, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == mine for address in addresses):
            return name
    return None


def _marks(task: JobSpec) -> dict[str, str]:
    run = RunDirectory(task.config)
    checkpoints, samples = ("train.checkpoint_root", run.checkpoints), ("sample.root", run.samples)
    # What an evaluation makes on its way lies beside the samples.
    roots = {"train": checkpoints, "sample": samples, "evaluate": samples}
    if task.config.train.checkpoint_root:
        roots["preflight"] = checkpoints
    if task.job.stage not in roots:
        return {}
    key, root = roots[task.job.stage]
    folder = local_path(root)
    if folder is None:
        return {}
    mark = folder.resolve() / f".{task.job.id}.seen"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return {key: str(mark)}
