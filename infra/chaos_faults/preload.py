"""Errors of system calls and steps of the clock, by a preloaded library that `cc` compiles."""

import ctypes
import errno
import mmap
import shutil
import subprocess
from pathlib import Path
from random import Random

SOURCE = Path(__file__).with_name("injection.c")
FUNCTIONS = (
    "open",
    "read",
    "write",
    "fsync",
    "rename",
    "unlink",
    "mkdir",
    "stat",
    "flock",
    "opendir",
    "close",
    "link",
)
"""Functions in the order of the enum in injection.c."""
ERRORS = {
    "open": ("EIO", "EMFILE", "ENFILE", "ESTALE", "ENOMEM", "EACCES", "ENOSPC"),
    "read": ("EIO", "ESTALE", "ENOMEM"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "ESTALE"),
    "fsync": ("EIO", "ENOSPC", "ESTALE"),
    "rename": ("EIO", "ENOSPC", "ESTALE", "EROFS"),
    "unlink": ("EIO", "ESTALE", "EROFS"),
    "mkdir": ("EIO", "ENOSPC", "EROFS"),
    "stat": ("EIO", "ESTALE", "EACCES", "ENOMEM"),
    "flock": ("EIO", "ENOLCK", "EINTR"),
    "opendir": ("EIO", "ESTALE", "EMFILE"),
    "close": ("EIO", "ENOSPC", "EDQUOT"),
    "link": ("EIO", "EPERM", "ENOSPC"),
}
CLOCK_STEPS_SECONDS = (-(10 * 365 * 86400), -86400, -3600, -61, -1.5, 1.5, 61, 3600, 86400, 10 * 365 * 86400)


class _Control(ctypes.Structure):
    _fields_ = [
        ("clock_ns", ctypes.c_int64),
        ("function", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("skip", ctypes.c_int32),
        ("left", ctypes.c_int32),
        ("fired", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("prefix", ctypes.c_char * 1024),
    ]


def compiler() -> str | None:
    """A C compiler of this machine, or None."""
    return shutil.which("cc") or shutil.which("gcc")


def compile_library(folder: Path) -> Path:
    """Compile the library into a folder. Raises RuntimeError with the compiler's output."""
    library = folder / "injection.so"
    command = [compiler() or "cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{SOURCE} does not compile: {done.stderr.strip()}")
    return library


class Preload:
    """The preloaded library of one episode, whose processes have `variables` in their environment."""

    def __init__(self, library: Path, control: Path, prefix: Path) -> None:
        """Calls fail only for paths below `prefix`."""
        control.write_bytes(bytes(ctypes.sizeof(_Control)))
        self._file = control.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), ctypes.sizeof(_Control))
        self._control = _Control.from_buffer(self._map)
        self._control.function = -1
        self._control.prefix = str(prefix).encode()
        self.variables = {"LD_PRELOAD": str(library), "CHAOS_CONTROL": str(control)}

    def step_clock(self, seconds: float) -> None:
        """Move the wall clock of the processes, relative to the true one."""
        self._control.clock_ns = int(seconds * 1e9)

    def arm(self, function: str, error: str, skip: int, count: int) -> None:
        """Make `count` calls of a function fail, after `skip` calls that succeed."""
        self._control.function = -1
        self._control.error = getattr(errno, error)
        self._control.skip, self._control.left, self._control.fired = skip, count, 0
        self._control.function = FUNCTIONS.index(function)

    def arm_randomly(self, rng: Random) -> str:
        """Make calls of a random function fail with a random error; return a description."""
        function = rng.choice(FUNCTIONS)
        error = rng.choice(ERRORS[function])
        skip, count = rng.choice((0, 0, 1, 3, 10, 40)), rng.choice((1, 1, 1, 2, 5, 30))
        self.arm(function, error, skip, count)
        return f"{count} x {error} of {function} after {skip} calls"

    def disarm(self) -> int:
        """Make no further call fail; return how many did."""
        self._control.function = -1
        return self._control.fired

    @property
    def fired(self) -> int:
        """Number of calls that have failed since `arm`."""
        return self._control.fired

    @property
    def spent(self) -> bool:
        """Whether all calls that were to fail have failed."""
        return self._control.left <= 0
