"""Advisory file lock (flock) among the processes and threads that share a file system."""

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fm_core.errors import UserError


@contextmanager
def file_lock(path: Path, wait: bool = True, create: bool = True) -> Generator[None]:
    """Hold an exclusive lock while the block runs.

    A lock file is never removed; otherwise one process could hold the lock of the removed file while another
    holds the lock of a new one.

    Args:
        path: the lock file.
        wait: whether to wait for the current holder.
        create: whether to create the lock file and its folder if they are missing.

    Raises:
        BlockingIOError: the lock is held and `wait` is false.
        FileNotFoundError: there is no lock file and `create` is false.
        UserError: the lock file is a symbolic link, which another user may have placed there.
    """
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a symbolic link, not a lock file; remove it") from None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
