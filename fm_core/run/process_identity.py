"""Identity of processes and hosts, as recorded in leases and job handles.

Process ids are meaningful only within one PID namespace of one boot, so that is what identifies a host here:
containers may share a host name but not their processes. A process is distinguished from a later one with the
same id by its start in clock ticks since boot, which does not change when the clock is set.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from fm_core.errors import UserError

_PROC = Path("/proc")
_DEAD_STATES = ("Z", "X", "x")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process in a record. Earlier versions recorded only host name, pid and `created`."""

    host: str
    """Name of its host, for messages."""
    pid: int
    created: float
    """Its start in seconds since 1970. It shifts with the clock, so it is used only without `ticks`."""
    host_id: str | None = None
    """`host_id()` of its host."""
    start_ticks: int | None = None
    """Its start in clock ticks since boot."""

    @classmethod
    def of(cls, pid: int) -> Self:
        """The identity of a process of this host. Raises psutil.NoSuchProcess.

        Raises:
            UserError: /proc shows the processes of another PID namespace.
        """
        _check_proc()
        process = psutil.Process(pid)
        ticks, _ = _start_and_state(pid)
        return cls(socket.gethostname(), pid, process.create_time(), host_id(), ticks)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self | None:
        """The process in a record; None if it contains none."""
        if record.get("pid") is None or record.get("created") is None:
            return None
        return cls(
            record["host"], record["pid"], record["created"], record.get("host_id"), record.get("start_ticks")
        )

    def facts(self) -> dict[str, Any]:
        """The entries of this process for a record."""
        return {
            "host": self.host,
            "host_id": self.host_id,
            "pid": self.pid,
            "created": self.created,
            "start_ticks": self.start_ticks,
        }

    @property
    def here(self) -> bool:
        """Whether it is, or was, a process of this host."""
        return self.host_id == host_id() if self.host_id else self.host == socket.gethostname()

    def alive(self) -> bool | None:
        """Whether it runs on this host; None if it is hidden from this user (hidepid).

        False for a process of another host.
        """
        if not self.here:
            return False
        try:
            ticks, state = _start_and_state(self.pid)
            if state in _DEAD_STATES:
                return False
            if self.start_ticks is not None:
                return ticks == self.start_ticks
            return abs(psutil.Process(self.pid).create_time() - self.created) < 1.0
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return None if _exists(self.pid) else False


def host_id() -> str:
    """Identity of this host: boot id and PID namespace, or the host name if there is no /proc."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{(_PROC / 'self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _start_and_state(pid: int) -> tuple[int, str]:
    """Start in clock ticks since boot and state letter, from fields 22 and 3 of /proc/PID/stat."""
    if not (_PROC / "self/stat").exists():
        process = psutil.Process(pid)
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return round(process.create_time() * 100), "Z" if zombie else "R"
    # The second field, the name in parentheses, may contain spaces and parentheses.
    fields = (
        (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    )
    return int(fields[19]), fields[0]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_proc() -> None:
    try:
        seen = str((_PROC / "self").readlink())
    except OSError:
        return
    if seen != str(os.getpid()):
        raise UserError(
            f"/proc belongs to another PID namespace (process {os.getpid()} is {seen} there); mount it in "
            "this one, e.g. with unshare --mount-proc"
        )
