"""Experiments with the real engine, several in one launch: `torchrun -m lab_rank FOLDER`.

Each writes what it found; test_engine.py reads it.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from fm_core.config import MethodSection, TrainSection
from fm_core.data.order import StreamOrder
from fm_core.errors import UserError
from fm_core.method.quantiser import Quantiser
from fm_core.models.build import build_method
from fm_core.run.files import read_lines, write_json
from fm_core.run.rank import Rank
from fm_core.training import checkpoint
from fm_core.training.batch import BatchSource
from fm_core.training.checkpoint import TrainState
from fm_core.training.ema import Averages, whole_weights
from fm_core.training.engine import initialize_process_group, make_engine
from fm_core.training.log import TrainLog
from fm_core.training.loop import Trainer, run
from fm_core.training.schedule import ema_decay

DECAYS = (0.9, 0.5)
RECIPE = {"model": {"channels": 8}, "data": {"version": "a1"}}


class Network(nn.Module):
    """Odd sizes, so that partitions are padded and cut through parameters."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.dropout = nn.Dropout(0.2)
        self.b = nn.Linear(7, 4)

    def forward(self, t, x, label=None):
        flat = x.flatten(1)
        hidden = self.a(torch.cat([flat, t[:, None].to(flat.dtype)], 1).to(self.a.weight.dtype))
        return self.b(self.dropout(torch.tanh(hidden))).view_as(x)


class Memory:
    def __init__(self):
        self.pixels = torch.arange(97 * 4).remainder(17).to(torch.uint8).view(97, 1, 2, 2)

    def __len__(self):
        return len(self.pixels)

    image_shape = (1, 2, 2)
    remote = False

    def read_into(self, ids, images):
        images.copy_(self.pixels[torch.from_numpy(ids)])
        return torch.zeros(len(ids), dtype=torch.int64)


def make_trainer(folder, device, dropout=True, **keys):
    rank, count = dist.get_rank(), dist.get_world_size()
    keys = {"global_batch": 12, "images": 12 * 6, "learning_rate": 0.05, "log_images": 24} | keys
    train = TrainSection.model_validate(
        {"checkpoint_images": 10**9, "ema_decays": DECAYS, "ema_warmup": False, **keys}
    )
    torch.manual_seed(0)
    network = Network()
    if not dropout:
        network.dropout.p = 0.0
    engine = make_engine(network, train, device)
    method = build_method(MethodSection())
    reader = Memory()
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        train=train,
        engine=engine,
        objective=method.objective,
        averages=Averages(engine, train.ema_decays, train.ema_warmup),
        source=BatchSource(
            reader,
            StreamOrder(3, len(reader)),
            Quantiser(17),
            method.objective.path,
            method.coupling,
            method.times,
            3,
            False,
        ),
        rank=Rank(rank, count, rank, folder, "lab"),
        device=device,
        root=folder / "checkpoints",
        recipe=RECIPE,
        conditional=False,
        log=None if rank else TrainLog(folder, folder / "metrics.jsonl", "lab", train.images),
    )


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def furthest(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def averages_and_checkpoints(folder, device, **keys):
    """A naive average of the whole weights beside ours; then save, load elsewhere, go on in both."""
    trainer = make_trainer(folder, device, **keys)
    naive = {decay: whole_weights(trainer.engine) for decay in DECAYS}
    update, steps = trainer.averages.update, []

    def both(applied):
        update(applied)
        steps.append(applied)
        now = whole_weights(trainer.engine)
        for decay, average in naive.items():
            for name, weight in now.items():
                average[name] += (1 - ema_decay(decay, applied, False)) * (weight - average[name])

    trainer.averages.update = both
    before = whole_weights(trainer.engine)
    state = run(trainer, TrainState(processes=dist.get_world_size()))
    raw = whole_weights(trainer.engine)
    ours = {decay: trainer.averages.weights(decay) for decay in DECAYS}
    found = {
        "steps": steps[:],
        "moved": furthest(before, raw),
        "apart": furthest(raw, ours[0.9]),
        "naive": max(furthest(naive[decay], ours[decay]) for decay in DECAYS),
        "looking_changes_nothing": equal(raw, whole_weights(trainer.engine)),
    }
    # Loading an average leaves the weights alone; all is exact.
    other = make_trainer(folder, device, **keys)
    other.log = trainer.log
    state_there = checkpoint.load(other.engine, other.averages, other.root, RECIPE)
    found |= {
        "state": state_there == checkpoint.read_state(other.root / checkpoint.step_name(state.step)),
        "loaded_raw": equal(raw, whole_weights(other.engine)),
        "loaded_averages": all(equal(ours[d], other.averages.weights(d)) for d in DECAYS),
    }
    longer = trainer.train.model_copy(update={"images": trainer.train.images + 24})
    trainer.train = other.train = longer
    run(trainer, state)
    run(other, state_there)
    found |= {
        "went_on_raw": equal(whole_weights(trainer.engine), whole_weights(other.engine)),
        "went_on_averages": all(
            equal(trainer.averages.weights(d), other.averages.weights(d)) for d in DECAYS
        ),
        "went_on": furthest(raw, whole_weights(other.engine)),
    }
    return found


def losses(folder, device, **keys):
    trainer = make_trainer(folder, device, dropout=False, log_images=12, **keys)
    run(trainer, TrainState(processes=dist.get_world_size()))
    weights = trainer.averages.weights(0.9)
    if trainer.log:
        save_file(weights, folder / "average.safetensors")
    return {"losses": [line["loss"] for line in read_lines(folder / "metrics.jsonl")]}


def refusal(folder, device, recipe):
    trainer = make_trainer(folder, device)
    try:
        checkpoint.load(trainer.engine, trainer.averages, folder / "checkpoints", recipe)
    except UserError as error:
        return str(error)
    return ""


def main():
    folder = Path(sys.argv[1])
    device = initialize_process_group()
    ranks = dist.get_world_size()
    found = {}
    if ranks == 2:
        for stage in (1, 2, 3):
            found[f"zero-{stage}"] = averages_and_checkpoints(
                folder / f"zero-{stage}", device, zero_stage=stage
            )
        found["bf16"] = averages_and_checkpoints(folder / "bf16", device, precision="bf16")
        found["stranger"] = refusal(folder / "zero-1", device, {**RECIPE, "model": {"channels": 16}})
        found["accumulated"] = losses(folder / "accumulated", device, micro_batch=2)
    else:
        # Written by two processes, in the launch before this one.
        found["processes"] = refusal(folder / "zero-1", device, RECIPE)
        for file in folder.glob("zero-2/checkpoints/*/raw.safetensors"):
            file.write_bytes(file.read_bytes()[:-1])
        found["damaged"] = refusal(folder / "zero-2", device, RECIPE)
    found["whole"] = losses(folder / f"whole-{ranks}", device)
    if dist.get_rank() == 0:
        write_json(folder / f"found-{ranks}.json", found)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
