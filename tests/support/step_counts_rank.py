"""Collectives, their bytes, waits and operations of a training step, on forked ranks (forked_ranks.py)."""

import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fm_core.storage.atomic_files import write_json
from tests.support import ROOT

NETWORKS = {4: ("digits", 704_705), 32: ("tiny-dit", 33_456)}
"""Number of ranks -> the network of the benchmarks that they train, and its number of parameters.

The network of 32 ranks is small, because they share two cores; a step has the same collectives.
"""
STEPS = 4
"""Steps whose counts are taken, as the difference of a longer and a shorter training."""


class StepCounter(TorchDispatchMode):
    """Counts what goes through torch's dispatcher on this thread: collectives of c10d, and operations.

    "numbers read" are the tensors whose value Python asks for: on a GPU each waits for the device.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            self.counts[name] += 1
            # Of an input and its larger output, the output is what a ring passes around.
            self.counts[f"bytes of {name}"] += max(
                (each.numel() * each.element_size() for each in tensors), default=0
            )
        elif func is torch.ops.aten._local_scalar_dense.default:
            self.counts["numbers read"] += 1
        else:
            self.counts["operations"] += 1
        return func(*args, **(kwargs or {}))


def counted(steps):
    """The counts of a training of this many steps, start and end included."""
    import program

    size, _ = NETWORKS[int(os.environ["WORLD_SIZE"])]
    task = {"size": size, "batch": 1, "warmup": steps, "steps": steps, "blocks": 1}
    with StepCounter() as counter:
        program.loop_lines(task, {})
    return counter.counts


def main(path):
    sys.path.insert(0, str(ROOT / "infra" / "benchmarks"))
    counted(1)  # the first training of a process allocates buffers
    short, long = counted(1), counted(1 + STEPS)
    # Each trains a block to warm up and one more.
    per_step = {key: (long[key] - short[key]) / (2 * STEPS) for key in sorted(long)}
    ranks = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, per_step)
    if dist.get_rank() == 0:
        write_json(Path(path) / f"step-{dist.get_world_size()}.json", {"ranks": ranks})
    dist.barrier()
