"""Number of CPU threads of torch in a stage that runs in the calling process."""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_threads(count: int) -> Generator[None]:
    """Run torch on `count` threads inside the block.

    Small networks gain nothing from more threads, and on a busy machine spinning OpenMP threads made the
    likelihood of eight digits take 150 s instead of 21 s.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
