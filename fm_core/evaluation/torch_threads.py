"""Number of torch's CPU threads in a stage that runs in the calling process."""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_threads(count: int) -> Generator[None]:
    """Run torch on `count` threads inside the block.

    Small networks do not benefit from more threads. On a busy machine, spinning OpenMP threads increased the
    time for the likelihood of eight digits from 21 s to 150 s.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
