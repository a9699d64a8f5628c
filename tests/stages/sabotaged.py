"""The optimal-transport path, whose n-th micro-batch in a process brings trouble.

SABOTAGE="RANK:WHAT:N": at the N-th micro-batch of that rank touch STOP, or be sent SIGTERM or SIGKILL.
"""

import os
import signal
from pathlib import Path

from fm_core.method.paths import OptimalTransport


class Sabotaged(OptimalTransport):
    drawn = 0

    def sample(self, x0, x1, t):
        type(self).drawn += 1
        rank, what, at = os.environ.get("SABOTAGE", "::").split(":")
        if rank == os.environ.get("RANK") and str(self.drawn) == at:
            if what == "stop":
                Path(os.environ["FM_CONTROL"], "STOP").touch()
            else:
                os.kill(os.getpid(), getattr(signal, what))
        return super().sample(x0, x1, t)
