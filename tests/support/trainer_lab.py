"""Small trainer on images in memory, for experiments with the real engine."""

import itertools

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.retention import Retention
from fm_core.config import MethodSection, TrainSection
from fm_core.data.sampler import GlobalShuffleSampler
from fm_core.launch.worker_main import Rank
from fm_core.method.dequantization import Quantizer
from fm_core.models.build import build_method
from fm_core.storage.atomic_files import read_lines
from fm_core.storage.keyed_random import CURRENT, Domain, KeyedRandom
from fm_core.training.batch_source import BatchSource
from fm_core.training.ema import ModelEMA, ema_decays
from fm_core.training.engine import make_engine, micro_batch_of
from fm_core.training.loop import Trainer
from fm_core.training.train_log import TrainLog
from fm_core.training.zero_state import _swapped_into_weights, float32_partitions

BATCH = 12
RECIPE = {"model": {"channels": 8}, "data": {"version": "a1"}}


class Network(nn.Module):
    """A network of odd sizes, so that partitions are padded and end within parameters."""

    def __init__(self, two_times=False):
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.dropout = nn.Dropout(0.2)
        self.b = nn.Linear(7, 4)
        self.second = nn.Linear(1, 7) if two_times else None

    def forward(self, t, x, label=None, s=None):
        flat = x.flatten(1)
        hidden = self.a(torch.cat([flat, t[:, None].to(flat.dtype)], 1).to(self.a.weight.dtype))
        if s is not None:
            hidden = hidden + self.second((s - t)[:, None].to(self.a.weight.dtype))
        return self.b(self.dropout(torch.tanh(hidden))).view_as(x)


class MemoryReader:
    """A reader that records the ids it is asked for."""

    def __init__(self):
        self.pixels = torch.arange(97 * 4).remainder(17).to(torch.uint8).view(97, 1, 2, 2)
        self.read = []

    def __len__(self):
        return len(self.pixels)

    image_shape = (1, 2, 2)
    remote = False

    def read_into(self, ids, images):
        self.read.append(ids.tolist())
        images.copy_(self.pixels[torch.from_numpy(ids)])
        return torch.zeros(len(ids), dtype=torch.int64)


class FaultySource(BatchSource):
    """Counts micro-batches; on the last rank, the velocity of those with a bad stream position is NaN."""

    drawn = 0
    bad: frozenset[int] = frozenset()

    def draw(self, batch, device):
        self.drawn += 1
        sample, labels = super().draw(batch, device)
        if dist.get_rank() == dist.get_world_size() - 1 and self.bad & set(batch.positions):
            sample.velocity.fill_(float("nan"))
        return sample, labels


def make_trainer(folder, device, dropout=True, bad=(), method=None, network=None, **keys):
    """The trainer of one rank; `bad` are the steps whose gradients are NaN (counted without a rollback)."""
    rank, count = dist.get_rank(), dist.get_world_size()
    keys = {"global_batch": BATCH, "images": BATCH * 6, "learning_rate": 0.05, "log_images": 24} | keys
    keys = {"checkpoint_images": 10**9, "ema_decays": (0.9, 0.5), "ema_warmup": False} | keys
    train = TrainSection.model_validate({"ema_power_widths": (0.1,), **keys})
    method, reader = build_method(method or MethodSection()), MemoryReader()
    if network is None:
        torch.manual_seed(0)
        network = Network(method.objective.two_times)
        network.dropout.p = 0.2 if dropout else 0.0
    engine = make_engine(network, train, device)
    path, times = method.objective.path, method.times
    order, random = GlobalShuffleSampler(3, len(reader)), KeyedRandom(CURRENT, 3, Domain.TRAINING)
    source = FaultySource(
        reader,
        order,
        Quantizer(17),
        path,
        method.coupling,
        times,
        random,
        False,
        equal_times=method.objective.equal_times,
    )
    source.bad = frozenset(position for step in bad for position in range(step * BATCH, (step + 1) * BATCH))
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        train=train,
        engine=engine,
        objective=method.objective,
        averages=ModelEMA(engine, ema_decays(train)),
        source=source,
        rank=Rank(rank, count, rank, folder, "engine"),
        device=device,
        recipe=RECIPE,
        conditional=False,
        flops=1e6,
        checkpoints=None if rank else checkpoints_at(folder),
        log=None if rank else TrainLog(folder, folder / "metrics.jsonl", "engine", train.images),
        rollback_record=None if rank else folder / "setback.json",
    )


def checkpoints_at(folder):
    return CheckpointCatalog(str(folder / "checkpoints"), folder / "staging", Retention(3))


def longer(trainer, steps):
    images = trainer.train.images + steps * BATCH
    trainer.train = trainer.train.model_copy(update={"images": images})


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def furthest(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def losses(folder):
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


@torch.no_grad()
def gather_full(engine, shards):
    """The full float32 tensors of shards on every rank, by DeepSpeed itself; all ranks must call it."""
    with _swapped_into_weights(engine, shards):
        return {
            name: safe_get_full_fp32_param(parameter).detach().to("cpu", torch.float32, copy=True)
            for name, parameter in engine.module.named_parameters()
        }


def full_weights(engine):
    """The unpartitioned float32 weights on the CPU of every rank; all ranks must call it."""
    return gather_full(engine, float32_partitions(engine))


def batch_ids(trainer):
    """Ids of every global batch that was trained on, in order."""
    read = trainer.source.reader.read[: trainer.source.drawn]
    ranks = [None] * dist.get_world_size()
    each = BATCH // len(ranks) // micro_batch_of(trainer.train, len(ranks))
    mine = [[*itertools.chain(*read[first : first + each])] for first in range(0, len(read), each)]
    dist.all_gather_object(ranks, mine)
    return [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)]
