"""Flow matching whose first loss or first velocity in a rank opens the debugger: BREAKPOINT=loss|velocity."""

import os

from fm_core.method.objectives import FlowMatching


class Stopping(FlowMatching):
    name = "stopping"
    stopped = False

    def stop(self, at):
        if "RANK" not in os.environ or os.environ.get("BREAKPOINT") != at or Stopping.stopped:
            return False
        Stopping.stopped = True
        return True

    def residual(self, prediction, sample):
        x_t = sample.x_t
        if self.stop("loss"):
            breakpoint()
        return prediction - sample.velocity + 0 * x_t

    def velocity_from(self, prediction, t, x):
        if self.stop("velocity"):
            breakpoint()
        return prediction
