"""Resource limits of this process: CPU cores, open files, memory."""

import math
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MAX_OPEN_FILES = 2**20
"""Upper bound, because some hard limits allow billions."""


def available_cores(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> int:
    """CPU cores that this process may use, at least 1: by its affinity mask and its cgroup's quota.

    A quota of less than one core counts as one.
    """
    # Not every system has affinity masks.
    mask = getattr(os, "sched_getaffinity", None)
    cores = len(mask(0)) if mask else os.cpu_count() or 1
    quotas = [quota for folder in _cgroup_folders("cpu", proc, cgroups) if (quota := _cpu_quota(folder))]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def raise_open_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit; return the resulting limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return open_file_limit()


def open_file_limit() -> int:
    """The soft limit of open files of this process."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(soft, MAX_OPEN_FILES)


class OomCounter:
    """Counts processes that the kernel has killed for lack of memory since this object was created."""

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> None:
        self._proc, self._cgroups = proc, cgroups
        self._before = self._kills()

    def new_kills(self) -> int:
        """Number of kills; 0 if the counters cannot be read."""
        return max(0, self._kills() - self._before)

    def _kills(self) -> int:
        """The largest counter. The host's includes those of its cgroups, but a container may not see it."""
        counters = [self._proc / "vmstat"]
        for folder in _cgroup_folders("memory", self._proc, self._cgroups):
            counters += [folder / "memory.events", folder / "memory.oom_control"]
        return max(_counted(path, "oom_kill") for path in counters)


def _cgroup_folders(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The cgroups of this process with this controller, outermost first, for cgroup version 1 or 2."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        yield root
        # In a container, the path may be that on the host, which does not exist here.
        for part in range(1, len(parts := Path(path).parts)):
            yield root.joinpath(*parts[1 : part + 1])


def _cpu_quota(folder: Path) -> float | None:
    """Cores of a cgroup's quota; None without one."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        return quota / period if quota > 0 else None
    return None


def _counted(path: Path, name: str) -> int:
    """A counter from a file of lines `NAME NUMBER`; 0 if it is missing."""
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
