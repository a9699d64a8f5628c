"""Gradients of flow maps in the real engine against one process, on forked ranks (forked_ranks.py)."""

from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist

from fm_core.config import MethodSection
from fm_core.models.unet import UNet
from fm_core.storage.atomic_files import write_json
from fm_core.training.engine import initialize_process_group, micro_batch_of, network_for
from tests.support.trainer_lab import BATCH, make_trainer

OBJECTIVES = {
    "meanflow": {"equal_times": 0.4},
    "meanflow, conditional tangent": {"equal_times": 0.4, "tangent": "conditional"},
    "split-meanflow": {"equal_times": 0.4},
}
SETTINGS = {
    "zero-1": {"zero_stage": 1},
    "zero-2": {"zero_stage": 2},
    "accumulated": {"zero_stage": 1, "micro_batch": 2},
    "accumulated zero-2": {"zero_stage": 2, "micro_batch": 3},
    "checkpointed": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "bf16 accumulated zero-2": {"precision": "bf16", "zero_stage": 2, "micro_batch": 3},
}
CASES = [
    *((objective, setting) for objective in ("meanflow", "split-meanflow") for setting in SETTINGS),
    ("meanflow, conditional tangent", "zero-1"),
]


def network(checkpointing):
    """A U-Net with attention and two times, without layers that are zero."""
    torch.manual_seed(1)
    made = UNet(2, 1, 8, (1,), 1, (2,), 8, 0.0, True, True, 0, 5.0, checkpointing, two_times=True)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def gradients(folder, device, objective, **keys):
    """Largest difference of a gradient from that of one process, relative to the largest gradient."""
    from deepspeed.utils import safe_get_full_grad

    name = objective.split(",")[0]
    method = MethodSection(objective=name, objective_options=OBJECTIVES[objective])
    made = network(keys.get("gradient_checkpointing", False))
    reference = deepcopy(made)
    trainer = make_trainer(folder, device, method=method, network=made, **keys)
    ranks, rank, source = dist.get_world_size(), dist.get_rank(), trainer.source
    micro = micro_batch_of(trainer.train, ranks)
    with source.batches(0, BATCH, rank, ranks, micro) as batches:
        for _ in range(BATCH // ranks // micro):
            sample, _ = source.draw(next(batches), device)
            losses = trainer.objective.loss(network_for(trainer.objective, trainer.engine), sample)
            trainer.engine.backward(losses.mean())
            last = trainer.engine.is_gradient_accumulation_boundary()
            if not last:
                trainer.engine.step()
    sharded = [safe_get_full_grad(parameter).float() for parameter in trainer.engine.module.parameters()]
    trainer.engine.step()
    with source.batches(0, BATCH, 0, 1, BATCH) as batches:
        sample, _ = source.draw(next(batches), device)
    assert 0 < len(sample.second.apart) < BATCH
    trainer.objective.loss(reference, sample).mean().backward()
    expected = [parameter.grad for parameter in reference.parameters()]
    largest = max(float(gradient.abs().max()) for gradient in expected)
    pairs = zip(sharded, expected, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


def main(path):
    folder, device = Path(path), initialize_process_group()
    results = {
        f"{objective}: {setting}": gradients(folder / f"{objective}-{setting}", device, objective, **keys)
        for objective, setting in CASES
        for keys in (SETTINGS[setting],)
    }
    if dist.get_rank() == 0:
        write_json(folder / "results-flow-maps.json", results)
