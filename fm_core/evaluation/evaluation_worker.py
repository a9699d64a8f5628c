"""Evaluation worker: the work of one rank.

Ranks share nothing: of each piece of work rank r makes the parts r, r + ranks, ... that are missing.
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
    """Make this rank's share of the parts that are missing."""
    device = torch.device("cuda", rank.local) if torch.cuda.is_available() else torch.device("cpu")
    evaluation = EvaluationRun(config, device)
    # The classifier was trained by whoever submitted this job.
    evaluation.open(lambda step, steps, loss: None)
    pace = RateMeter()
    total = sum(len(work.ranges) for work in evaluation.works.values())
    for work in evaluation.works.values():
        for number in work.missing():
            if number % rank.count != rank.number:
                continue
            if rank.stop_requested():
                raise StopRequested(f"stopped during {work.phase}; what is finished stays")
            if rank.first:
                done = total - sum(len(other.missing()) for other in evaluation.works.values())
                progress = Progress("evaluate", done, total, "parts", work.phase, pace.rate(done))
                write_status(rank.control, progress, job=rank.job, process=os.getpid())
            work.run(number)
