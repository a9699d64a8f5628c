"""Namespaces of the chaos test for mounts, network and processes, so that the machine is not affected."""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

VARIABLE = "CHAOS_NAMESPACES"
SPACES = ("--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
ENTER = "infra.chaos_faults.namespaces"
HOST_SPACES = (
    *("--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("sleep", "infinity"),
)


def run_isolated(command: Sequence[str]) -> int | None:
    """Run a command in new namespaces and return its exit status.

    None if this process is already in such namespaces, or if this user cannot create any.
    """
    if VARIABLE in os.environ:
        return None
    for user in ((), ("--user", "--map-root-user")):
        unshare = ["unshare", *user, *SPACES]
        if _succeeds(*unshare, "true"):
            return subprocess.call([*unshare, *command], env={**os.environ, VARIABLE: "1"})
    return None


def is_isolated() -> bool:
    """Whether this process is in its own namespaces."""
    return VARIABLE in os.environ


def prepare() -> None:
    """Make mounts private but propagate them to inner hosts, and start the loopback interface."""
    run("mount", "--make-rprivate", "/")
    run("mount", "--make-rshared", "/")
    if shutil.which("ip"):
        run("ip", "link", "set", "lo", "up")


def run(*command: object) -> None:
    """Run a command that must succeed. Raises RuntimeError with its error output."""
    done = subprocess.run([str(part) for part in command], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


@dataclass(frozen=True)
class ProcessHost:
    """A PID namespace, which the program treats as another host with the same disks."""

    keeper: subprocess.Popen[bytes]
    first: int
    """The process that holds the namespace."""

    @classmethod
    def start(cls) -> "ProcessHost":
        """Make the namespace."""
        keeper = subprocess.Popen(["unshare", *HOST_SPACES])
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(keeper.pid).children()):
            if time.monotonic() > deadline or keeper.poll() is not None:
                raise RuntimeError("cannot make a PID namespace")
            time.sleep(0.02)
        return cls(keeper, children[0].pid)

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command there."""
        # nsenter would be stopped together with the command and forward SIGCONT to it.
        return [sys.executable, "-m", ENTER, str(self.first), *command]

    def close(self) -> None:
        """End every process of the host."""
        self.keeper.kill()
        self.keeper.wait()


def main(first: str, command: Sequence[str]) -> None:
    """Run a command in the mount and PID namespaces of a process, and end as it does."""
    libc = ctypes.CDLL(None, use_errno=True)
    files = [os.open(f"/proc/{first}/ns/{space}", os.O_RDONLY) for space in ("pid", "mnt")]
    for file in files:
        if libc.setns(file, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(file)
    child = os.fork()
    if child == 0:
        os.execvp(command[0], command)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
