"""Parts of the method that fail, stall or flood the log on request, configured by import path.

A run finds them as `tests.support.fault_injection:FaultyPath`, with the repository root on its PYTHONPATH.
"""

import os
import signal
import threading
import time
import warnings
from pathlib import Path

import torch.distributed as dist

from fm_core.launch import worker_main
from fm_core.method.objectives import FlowMatching
from fm_core.method.paths import OptimalTransport
from tests.support import ROOT

LINES_PER_STEP, NOISY_STEPS = 3_000, 20
"""With two ranks 120,000 lines."""


class FaultyPath(OptimalTransport):
    """The optimal-transport path with a fault at the n-th micro-batch of a process.

    FAULT="RANK:WHAT:N": at its N-th micro-batch, and after it has finished saving, that rank touches STOP,
    begins to wait a second for each fsync (slow), flips a bit of the newest checkpoint and kills itself
    (damage), kills itself when it next sends a piece of a checkpoint (sending), or sends itself the signal
    WHAT.
    """

    drawn = 0

    def sample(self, x0, x1, t):
        type(self).drawn += 1
        rank, what, at = os.environ.get("FAULT", "::").split(":")
        if rank == os.environ.get("RANK") and str(self.drawn) == at:
            control = Path(os.environ["FM_CONTROL"])
            finish_saving()
            if what == "stop":
                (control / "STOP").touch()
                worker_main.STOP_SECONDS = 0.0  # this step, and not one some seconds later, is the last
            elif what == "slow":
                os.fsync = lambda file, fsync=os.fsync: (time.sleep(1.0), fsync(file))
            elif what == "damage":
                flip_last_bit(max(control.glob("train/checkpoints/step-*/raw.safetensors")))
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "sending":
                dist.send = lambda *content, **to: os.kill(os.getpid(), signal.SIGKILL)
            else:
                os.kill(os.getpid(), getattr(signal, what))
        return super().sample(x0, x1, t)


def finish_saving() -> None:
    """Wait until this process has written, or sent, the checkpoints that it has started to save."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint-saver":
            thread.join()


def flip_last_bit(path: Path) -> None:
    """Damage a file as a failing disk does."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class FailingPath(OptimalTransport):
    """The optimal-transport path that raises at the first micro-batch, with a message of two lines."""

    def sample(self, x0, x1, t):
        raise ZeroDivisionError("a number\nof two lines")


class FailingObjective(FlowMatching):
    """Flow matching whose loss raises at the first step."""

    def loss(self, network, sample, label=None):
        raise ArithmeticError("no loss today")


class NoisyObjective(FlowMatching):
    """Slow flow matching that prints far too much initially and fails on rank 1 while ROOT/FAIL exists."""

    name = "noisy"

    def __init__(self, path) -> None:
        super().__init__(path)
        self.steps = 0

    def loss(self, network, sample, label=None):
        if "RANK" in os.environ:
            self.steps += 1
            if self.steps <= NOISY_STEPS:
                print("\n".join(f"step {self.steps}, line {line}" for line in range(LINES_PER_STEP)))
                warnings.warn("the noisy objective is tired", stacklevel=1)
            if (ROOT / "FAIL").exists() and os.environ["RANK"] == "1":
                raise FloatingPointError("the test wants a failure")
            time.sleep(0.4)
        return super().loss(network, sample, label)
