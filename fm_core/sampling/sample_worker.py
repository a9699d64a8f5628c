"""Sampling worker: the work of one rank.

Ranks do not communicate: rank r generates batches r, r + ranks, ... and skips those that exist.
"""

import os
import time

import torch

from fm_core.config import RunConfig
from fm_core.errors import StopRequested
from fm_core.launch.worker_main import Rank
from fm_core.run.progress import Progress, RateMeter
from fm_core.run.status import write_status
from fm_core.sampling.checkpoint_source import job_weights, load_model
from fm_core.sampling.generate import generate, time_grid
from fm_core.sampling.guide_model import accelerated_model, with_guide
from fm_core.sampling.sample_protocol import draw_of, protocol_of
from fm_core.sampling.sample_store import SampleSet

TRAJECTORY_FRAMES = 17
"""Number of times at which a trajectory is saved."""
REPORT_SHARE = 0.05
"""Largest fraction of its time that rank 0 spends on reports; listing a store can take seconds."""


def sample(config: RunConfig, rank: Rank) -> None:
    """Generate this rank's share of the missing batches."""
    device = torch.device("cuda", rank.local) if torch.cuda.is_available() else torch.device("cpu")
    step, weights = job_weights(config, rank.control)
    model = with_guide(load_model(weights, device, config), config, device, rank.control)
    model = accelerated_model(model, config.sample)
    protocol = protocol_of(config, model.weights_sha256, model.generator, model.guide_record)
    samples = SampleSet(config, step, protocol)
    draw = draw_of(config)
    report = _Reporter(samples, rank)
    for number in range(rank.number, samples.batches, rank.count):
        if rank.first:
            report()
        if rank.stop_requested():
            raise StopRequested(f"stopped after {sum(shard.images for shard in samples.finished()):,} images")
        if samples.complete(number):
            continue
        first, count = samples.extent(number)
        with_trajectory = number == 0 and samples.trajectories
        times = time_grid(model.objective.interval, TRAJECTORY_FRAMES) if with_trajectory else None
        samples.write(number, generate(model, draw, first, count, device, times))
    if rank.first:
        report(last=True)


class _Reporter:
    """Reports by rank 0 on the finished work of all ranks, limited to a small share of its time."""

    def __init__(self, samples: SampleSet, rank: Rank) -> None:
        self._samples, self._rank, self._meter = samples, rank, RateMeter()
        self._next = 0.0

    def __call__(self, last: bool = False) -> None:
        """Write the status, unless the last report is too recent in relation to its duration."""
        began = time.monotonic()
        if began < self._next and not last:
            return
        finished = self._samples.finished()
        done = sum(shard.images for shard in finished)
        nfe = f"NFE {sum(shard.nfe * shard.images for shard in finished) / done:.0f}" if done else ""
        progress = Progress("sample", done, self._samples.images, "images", nfe, self._meter.rate(done))
        write_status(self._samples.control, progress, job=self._rank.job, process=os.getpid())
        now = time.monotonic()
        self._next = now + (now - began) / REPORT_SHARE
