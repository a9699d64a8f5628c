"""Evaluation worker: the computation of one rank.

Ranks do not communicate. For each task, rank r computes the missing parts among r, r + ranks, ...
"""

import os

import torch

from fm_core.config import RunConfig
from fm_core.errors import StopRequested
from fm_core.evaluation.evaluation_run import EvaluationRun
from fm_core.launch.worker_main import Rank
from fm_core.run.progress import Progress, RateMeter
from fm_core.run.status import write_status


def evaluate(config: RunConfig, rank: Rank) -> None:
    """Compute this rank's share of the missing parts."""
    device = torch.device("cuda", rank.local) if torch.cuda.is_available() else torch.device("cpu")
    evaluation = EvaluationRun(config, device, rank.control, rank.job)
    # The classifier was trained by the process that submitted this job.
    evaluation.open(lambda step, steps, loss: None)
    rate_meter = RateMeter()
    total = sum(len(task.ranges) for task in evaluation.tasks.values())
    for task in evaluation.tasks.values():
        for number in task.missing():
            if number % rank.count != rank.number:
                continue
            if rank.stop_requested():
                raise StopRequested(f"stopped during {task.phase}; finished parts are kept")
            if rank.first:
                done = total - sum(len(other.missing()) for other in evaluation.tasks.values())
                progress = Progress("evaluate", done, total, "parts", task.phase, rate_meter.rate(done))
                write_status(rank.control, progress, job=rank.job, process=os.getpid())
            task.run(number)
