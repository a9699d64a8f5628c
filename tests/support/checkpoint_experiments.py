"""Checkpoints saved by all ranks in unusual circumstances, and in an earlier format."""

import os
import resource

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fm_core.checkpoint import checkpoint_loader, tensor_layout
from fm_core.checkpoint.format import recorded_files, recorded_origin, seal
from fm_core.checkpoint.optimizer_shards import opened_shards
from fm_core.checkpoint.train_state import TrainState
from fm_core.run.directory import step_name
from fm_core.training.loop import run
from fm_core.training.zero_state import MOMENTS
from tests.support.trainer_lab import equal, make_trainer


def resume(trainer):
    return checkpoint_loader.load(trainer.sharded, trainer.checkpoints, trainer.recipe)


def full_disk(folder, device, rank):
    """The kernel does not let one rank's files grow while the second checkpoint is written."""
    trainer = make_trainer(folder, device)
    state = run(trainer, TrainState())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    problem = save(trainer, state.model_copy(update={"step": 9}))
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, problem and problem.message)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    again = resume(make_trainer(folder, device))
    return {"messages": messages, "names": names, "step": again.step}


def save(trainer, state):
    trainer.saver.start(trainer.sharded, state, trainer.checkpoints, trainer.recipe)
    trainer.saver.wait()
    return trainer.saver.take()[0].result


def without_a_shared_folder(folder, device):
    """The same state saved by ranks that share a folder, and by one whose host does not have it.

    Small pieces, so that each shard is sent in several.
    """
    largest, tensor_layout.PIECE_ELEMENTS = tensor_layout.PIECE_ELEMENTS, 7
    trainer = make_trainer(folder, device)
    state = run(trainer, TrainState())
    access, asked = os.access, []
    problem = save(trainer, state.model_copy(update={"step": 7}))
    os.access = lambda path, mode: asked.append(path) or False
    other_problem = save(trainer, state.model_copy(update={"step": 8}))
    os.access, tensor_layout.PIECE_ELEMENTS = access, largest
    asked_by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(asked_by_rank, len(asked))
    files = [recorded_files(folder / "checkpoints" / step_name(step)) for step in (6, 7, 8)]
    for facts in files:
        facts.pop("state.json")
    shards = [
        {
            f"{path.name} {key}": tensor
            for path in (folder / "checkpoints" / step_name(step) / "optimizer").iterdir()
            for key, tensor in load_file(path).items()
        }
        for step in (7, 8)
    ]
    return {
        "problems": [problem, other_problem],
        "asked": asked_by_rank,
        "files": files,
        "equal": equal(*shards),
    }


def write_as_earlier(directory):
    """Replace the shards of a checkpoint by a file per moment, as earlier versions wrote."""
    for moment in MOMENTS:
        with (
            opened_shards(directory, f"optimizer/{moment}") as shards,
            safe_open(directory / "raw.safetensors", framework="pt") as weights,
        ):
            tensors = {name: shards.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        save_file(tensors, directory / "optimizer" / f"{moment}.safetensors")
    for path in directory.glob("optimizer/*-of-*.safetensors"):
        path.unlink()
    seal(directory, recorded_origin(directory))
