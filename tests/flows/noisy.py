"""An objective for tests of long runs: it takes its time, says far too much, and fails when it is asked to.

Copied into the root of a demo, where `method.objective: noisy:Noisy` finds it.
"""

import os
import time
import warnings
from pathlib import Path

from fm_core.method.objectives import FlowMatching

HERE = Path(__file__).parent
LINES_A_STEP, NOISY_STEPS = 3_000, 20
"""With two ranks 120,000 lines."""


class Noisy(FlowMatching):
    name = "noisy"

    def __init__(self, path) -> None:
        super().__init__(path)
        self.steps = 0

    def loss(self, network, sample, label=None):
        if "RANK" in os.environ:
            self.steps += 1
            if self.steps <= NOISY_STEPS:
                print("\n".join(f"step {self.steps}, line {line}" for line in range(LINES_A_STEP)))
                warnings.warn("the noisy objective is tired", stacklevel=1)
            if (HERE / "FAIL").exists() and os.environ["RANK"] == "1":
                raise FloatingPointError("the test wants a failure")
            time.sleep(0.4)
        return super().loss(network, sample, label)
