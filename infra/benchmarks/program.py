"""Contenders for training: this project's loop on images in memory, and a plain DDP loop."""

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from same_work import CLIP, DECAY, RATE, SIZES, model_section, timed

from fm_core.checkpoint.train_state import TrainState
from fm_core.config import MethodSection, TrainSection
from fm_core.data.sampler import GlobalShuffleSampler
from fm_core.launch.worker_main import Rank
from fm_core.method.dequantization import Quantizer
from fm_core.models.build import build_method, build_network
from fm_core.models.flops import flops_per_image
from fm_core.storage.atomic_files import read_lines
from fm_core.storage.keyed_random import CURRENT, Domain, KeyedRandom
from fm_core.training.batch_source import BatchSource
from fm_core.training.ema import ModelEMA, ema_decays
from fm_core.training.engine import initialize_process_group, make_engine
from fm_core.training.loop import Trainer, run
from fm_core.training.train_log import TrainLog


class MemoryReader:
    """Reader that serves random images from memory."""

    remote = False

    def __init__(self, image_shape: tuple[int, int, int], images: int = 512) -> None:
        self.image_shape = image_shape
        self.pixels = torch.randint(0, 256, (images, *image_shape), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def read_into(self, ids: np.ndarray, images: torch.Tensor) -> torch.Tensor:
        images.copy_(self.pixels[torch.from_numpy(ids)])
        return torch.zeros(len(ids), dtype=torch.int64)


Line = dict[str, Any]
"""A line of metrics.jsonl."""


def loop(task: dict[str, Any], speed: dict[str, Any] | None = None) -> list[float]:
    """Seconds per step for each block of steps in this project's loop, from its metrics."""
    return block_seconds(loop_lines(task, speed or {}), task)


def block_seconds(lines: list[tuple[Line, Line]], task: dict[str, Any]) -> list[float]:
    """Seconds per step for each block, from the metrics before and after the block."""
    return [(after["seconds"] - before["seconds"]) / task["steps"] for before, after in lines]


def loop_lines(task: dict[str, Any], speed: dict[str, Any], reader: Any = None) -> list[tuple[Line, Line]]:
    """Metrics before and after each block of steps, on rank 0; images are in memory by default."""
    device = initialize_process_group()
    train = _train_section(task, speed)
    torch.manual_seed(0)
    engine = make_engine(_network(task), train, device)
    number, count = dist.get_rank(), dist.get_world_size()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics = folder / "metrics.jsonl"
        source = _source(task, reader, speed)
        trainer = Trainer(
            train=train,
            engine=engine,
            objective=build_method(MethodSection()).objective,
            averages=ModelEMA(engine, ema_decays(train)),
            source=source,
            rank=Rank(number, count, number, folder, "benchmark"),
            device=device,
            recipe={},
            conditional=False,
            flops=forward_flops(task["size"]),
            checkpoints=None,
            log=TrainLog(folder, metrics, "benchmark", train.images) if number == 0 else None,
        )
        run(trainer, TrainState(processes=count))
        lines = read_lines(metrics) if number == 0 else []
        dist.barrier()
    return [*pairwise(lines)][_warm_blocks(task) - 1 :]


def plain_ddp(task: dict[str, Any]) -> list[float]:
    """Seconds per step of the same work in a plain loop: DDP, fused AdamW, clipping, EMA."""
    device = initialize_process_group()
    train = _train_section(task, {})
    torch.manual_seed(0)
    network = torch.nn.parallel.DistributedDataParallel(_network(task))
    weights = [*network.parameters()]
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=train.learning_rate, weight_decay=0.0, fused=True)
    objective, source = build_method(MethodSection()).objective, _source(task)
    ranks = dist.get_world_size()
    with source.batches(0, train.global_batch, dist.get_rank(), ranks, task["batch"]) as batches:

        def step(number: int) -> None:
            sample, _ = source.draw(next(batches), device)
            objective.loss(network, sample, None).mean().backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - DECAY)

        return timed(step, task, device)


def forward_flops(size: str) -> float:
    """FLOPs of one image's forward pass."""
    with torch.device("meta"):
        return flops_per_image(_network({"size": size}), SIZES[size]["shape"])


def _network(task: dict[str, Any]) -> torch.nn.Module:
    return build_network(model_section(task["size"]), SIZES[task["size"]]["shape"], 0)


def _source(task: dict[str, Any], reader: Any = None, speed: dict[str, Any] | None = None) -> BatchSource:
    method, compiled = build_method(MethodSection()), (speed or {}).get("compile", False)
    reader = reader or MemoryReader(SIZES[task["size"]]["shape"])
    return BatchSource(
        reader,
        GlobalShuffleSampler(0, len(reader)),
        Quantizer(256),
        method.objective.path,
        method.coupling,
        method.times,
        random=KeyedRandom(task.get("generator", CURRENT), 0, Domain.TRAINING, compiled),
        flip=False,
    )


def _warm_blocks(task: dict[str, Any]) -> int:
    return max(1, -(-task["warmup"] // task["steps"]))


def _train_section(task: dict[str, Any], speed: dict[str, Any]) -> TrainSection:
    batch = task["batch"] * dist.get_world_size()
    block = batch * task["steps"]
    keys = {
        "images": block * (_warm_blocks(task) + task["blocks"]),
        "global_batch": batch,
        "learning_rate": RATE,
        "gradient_clip": CLIP,
        "ema_decays": (DECAY,),
        "log_images": block,
        "checkpoint_images": 10**12,
        "precision": task.get("precision", "auto"),
        "speed": speed,
    }
    return TrainSection.model_validate(keys)
