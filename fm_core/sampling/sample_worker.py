"""Sampling worker: the work of one rank.

Ranks do not communicate: rank r makes batches r, r + ranks, ... and skips those that exist.
"""

import os
from dataclasses import replace

import torch

from fm_core.config import RunConfig
from fm_core.errors import StopRequested
from fm_core.launch.worker_main import Rank
from fm_core.run.progress import Progress, RateMeter
from fm_core.run.status import write_status
from fm_core.sampling.checkpoint_source import job_weights, load_model
from fm_core.sampling.compiled_network import accelerated
from fm_core.sampling.generate import generate, time_grid
from fm_core.sampling.sample_store import SampleSet, draw_of, protocol_of

TRAJECTORY_FRAMES = 17
"""Number of times at which a trajectory is saved."""


def sample(config: RunConfig, rank: Rank) -> None:
    """Make this rank's share of the missing batches."""
    device = torch.device("cuda", rank.local) if torch.cuda.is_available() else torch.device("cpu")
    step, weights = job_weights(config, rank.control)
    model = load_model(weights, device)
    model = replace(model, network=accelerated(model.network, config.sample))
    samples = SampleSet(config, step, protocol_of(config, model.weights_sha256))
    draw = draw_of(config)
    meter = RateMeter()
    for number in range(rank.number, samples.batches, rank.count):
        if rank.first:
            _report(samples, rank, meter)
        if rank.stop_requested():
            raise StopRequested(f"stopped after {sum(shard.images for shard in samples.finished()):,} images")
        if samples.complete(number):
            continue
        first, count = samples.extent(number)
        with_trajectory = number == 0 and samples.trajectories
        times = time_grid(model.objective.interval, TRAJECTORY_FRAMES) if with_trajectory else None
        samples.write(number, generate(model, draw, first, count, device, times))
    if rank.first:
        _report(samples, rank, meter)


def _report(samples: SampleSet, rank: Rank, meter: RateMeter) -> None:
    finished = samples.finished()
    done = sum(shard.images for shard in finished)
    nfe = f"NFE {sum(shard.nfe * shard.images for shard in finished) / done:.0f}" if done else ""
    progress = Progress("sample", done, samples.images, "images", nfe, meter.rate(done))
    write_status(samples.control, progress, job=rank.job, process=os.getpid())
