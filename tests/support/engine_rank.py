"""Experiments with the real engine, several per job of forked ranks (forked_ranks.py).

Rank 0 writes the results to results-RANKS.json, which test_engine.py reads.
"""

import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from fm_core.checkpoint.format import complete_steps, read_state
from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import UnrecoverableError, UserError
from fm_core.storage.atomic_files import read_json, read_lines, write_json
from fm_core.training.engine import initialize_process_group
from fm_core.training.loop import run
from fm_core.training.zero_state import moments
from tests.support.checkpoint_experiments import (
    full_disk,
    resume,
    without_a_shared_folder,
    write_as_earlier,
)
from tests.support.trainer_lab import (
    BATCH,
    RECIPE,
    batch_ids,
    equal,
    full_weights,
    furthest,
    gather_full,
    longer,
    losses,
    make_trainer,
)

KINDS = {
    "zero-1": {"zero_stage": 1},
    "zero-2": {"zero_stage": 2},
    "zero-3": {"zero_stage": 3},
    "bf16": {"precision": "bf16"},
    "bf16-accumulated": {"precision": "bf16", "micro_batch": 1},  # another optimizer of DeepSpeed's
    "bf16-zero-3": {"precision": "bf16", "zero_stage": 3},
}
STATE = ("step", "applied_steps", "images_seen", "position", "seconds")


def averages_of(trainer):
    return {name: gather_full(trainer.engine, shards) for name, shards in trainer.averages.shards.items()}


def moments_of(trainer):
    parts = {name: gather_full(trainer.engine, shards) for name, shards in moments(trainer.engine).items()}
    return {f"{part} {name}": tensor for part in parts for name, tensor in parts[part].items()}


def averages_and_checkpoints(folder, device, **keys):
    """Compare with a naive average of the full weights; save, load in a second trainer, continue both."""
    trainer = make_trainer(folder, device, **keys)
    naive = {name: full_weights(trainer.engine) for name in trainer.averages.decays}
    update, steps = trainer.averages.update, []

    def both(applied):
        update(applied)
        steps.append(applied)
        now = full_weights(trainer.engine)
        for kind, average in naive.items():
            for name, weight in now.items():
                average[name] += (1 - trainer.averages.decays[kind](applied)) * (weight - average[name])

    trainer.averages.update = both
    before = full_weights(trainer.engine)
    state = run(trainer, TrainState())
    raw, ours, adam = full_weights(trainer.engine), averages_of(trainer), moments_of(trainer)
    results = {
        "steps": steps[:],
        "moved": furthest(before, raw),
        "average_distance": furthest(raw, ours["ema-0.9"]),
        "naive": max(furthest(naive[name], ours[name]) for name in naive),
        "looking_changes_nothing": equal(raw, full_weights(trainer.engine)),
    }
    # Loading an average does not change the weights; everything is exact.
    other = make_trainer(folder, device, **keys)
    other.log = trainer.log
    state_there = resume(other)
    results |= {
        "state": all(getattr(state_there, key) == getattr(state, key) for key in STATE),
        "loaded_raw": equal(raw, full_weights(other.engine)),
        "loaded_averages": all(equal(ours[name], average) for name, average in averages_of(other).items()),
        "loaded_moments": equal(adam, moments_of(other)),
    }
    for one in (trainer, other):
        longer(one, 2)
        one.source.drawn = 0
        one.source.reader.read.clear()
    run(trainer, state)
    run(other, state_there)
    ids = batch_ids(trainer)
    results |= {
        "went_on_moments": equal(moments_of(trainer), moments_of(other)),
        "went_on_ids": [len(batch) for batch in ids] == [BATCH, BATCH] and ids == batch_ids(other),
        # Two lines of one file: both wrote theirs of step 8.
        "went_on_losses": losses(folder)[-2:],
        "went_on_raw": equal(full_weights(trainer.engine), full_weights(other.engine)),
        "went_on_averages": all(
            equal(average, averages_of(other)[name]) for name, average in averages_of(trainer).items()
        ),
        "went_on": furthest(raw, full_weights(other.engine)),
    }
    return results


def first_half(folder, device, **keys):
    """Six steps and a checkpoint, retained for other numbers of processes; then two more steps."""
    trainer = make_trainer(folder, device, dropout=False, log_images=12, **keys)
    state = run(trainer, TrainState())
    if trainer.log:
        shutil.copytree(folder / "checkpoints", folder / "retained")
    dist.barrier()
    return _second_half(trainer, state, folder)


def second_half(source, folder, device, earlier=False, **keys):
    """Continue from the retained checkpoint with the processes, and the ZeRO stage, of this launch."""
    if dist.get_rank() == 0:
        shutil.copytree(source / "retained", folder / "checkpoints")
        if earlier:
            write_as_earlier(folder / "checkpoints" / "step-00000006")
    dist.barrier()
    trainer = make_trainer(folder, device, dropout=False, log_images=12, **keys)
    return _second_half(trainer, resume(trainer), folder)


def _second_half(trainer, state, folder):
    trainer.source.drawn = 0
    trainer.source.reader.read.clear()
    longer(trainer, 2)
    state = run(trainer, state)
    if trainer.log:
        weights = {"raw": full_weights(trainer.engine), **averages_of(trainer)}
        save_file({f"{a} {b}": t for a in weights for b, t in weights[a].items()}, folder / "end.safetensors")
    else:
        full_weights(trainer.engine)
        averages_of(trainer)
    return {"ids": batch_ids(trainer), "losses": losses(folder)[-2:], "images_seen": state.images_seen}


def train_through(folder, device, **keys):
    trainer = make_trainer(folder, device, dropout=False, log_images=12, **keys)
    run(trainer, TrainState())
    weights = averages_of(trainer)["ema-0.9"]
    if trainer.log:
        save_file(weights, folder / "average.safetensors")
    return {"losses": losses(folder)}


def one_bad_batch(folder, device, **keys):
    """A NaN only on the last rank, in step 3 of 6."""
    trainer = make_trainer(folder, device, bad=[3], **keys)
    seen = [full_weights(trainer.engine)]
    update = trainer.averages.update
    trainer.averages.update = lambda applied: (update(applied), seen.append(full_weights(trainer.engine)))
    state = run(trainer, TrainState())
    finite = all(t.isfinite().all().item() for part in averages_of(trainer).values() for t in part.values())
    return {
        "applied": len(seen) - 1,
        "state": [state.step, state.applied_steps, state.images_seen, state.position],
        "finite": finite and all(t.isfinite().all().item() for t in seen[-1].values()),
        "lines": read_lines(folder / "metrics.jsonl"),
    }


def going_back(folder, device):
    """Steps 5, 6, 7 are bad and three in a row are too many; checkpoints after steps 2, 4, 6, 8."""
    keys = {"skipped_limit": 3, "checkpoint_images": 24, "images": 96, "log_images": 12}
    trainer = make_trainer(folder, device, bad=[5, 6, 7], **keys)
    state = run(trainer, TrainState())
    # The same by hand: the checkpoint of step 6 (5 applied, one skipped), then the data from step 8 on.
    by_hand = make_trainer(folder / "by-hand", device, **keys)
    first = make_trainer(folder / "first", device, bad=[5], **{**keys, "images": 72})
    run(first, TrainState())
    if first.log:
        shutil.copytree(folder / "first" / "checkpoints", folder / "by-hand" / "checkpoints")
    dist.barrier()
    there = run(by_hand, resume(by_hand).model_copy(update={"position": 96}))
    return {
        "state": state.model_dump(),
        "by_hand": [there.images_seen, there.position],
        "equal": equal(full_weights(trainer.engine), full_weights(by_hand.engine)),
        "record": read_json(folder / "setback.json"),
        "steps": [line["step"] for line in read_lines(folder / "metrics.jsonl")],
    }


def refused(action):
    """The user error or unrecoverable error of `action` on every rank; empty if it succeeds."""
    try:
        action()
    except (UserError, UnrecoverableError) as error:
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, f"{type(error).__name__}: {error}")
        return messages
    return []


def no_way_on(folder, device):
    """All data is bad from step 3 on; the logging interval is two steps and the limit is far."""
    keys = {"skipped_limit": 100, "checkpoint_images": 24, "images": 120}
    trainer = make_trainer(folder / "always", device, bad=range(3, 30), **keys)
    fresh = make_trainer(folder / "fresh", device, bad=range(30), skipped_limit=2)
    return {
        "again": refused(lambda: run(trainer, TrainState())),
        "steps": complete_steps(folder / "always" / "checkpoints"),
        "nothing_to_go_back_to": refused(lambda: run(fresh, TrainState())),
    }


def strangers(folder, device):
    trainer = make_trainer(folder, device)
    trainer.recipe = {**RECIPE, "model": {"channels": 16}, "image_shape": [3, 64, 64]}
    return refused(lambda: resume(trainer))


def damaged(folder, device):
    """Rank 0 detects a flipped bit and all load the checkpoint before; then none is intact."""
    steps = complete_steps(folder / "checkpoints")
    flip(folder / "checkpoints" / f"step-{steps[-1]:08d}" / "optimizer" / "00001-of-00002.safetensors")
    trainer = make_trainer(folder, device)
    taken = [None] * dist.get_world_size()
    dist.all_gather_object(taken, resume(trainer).step)
    for step in steps[:-1]:
        flip(folder / "checkpoints" / f"step-{step:08d}" / "state.json")
    return {"steps": steps, "taken": taken, "none": refused(lambda: resume(trainer))}


def flip(path):
    if dist.get_rank() == 0:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    dist.barrier()


def main(path):
    folder = Path(path)
    device = initialize_process_group()
    ranks = dist.get_world_size()
    results = {"unaccumulated": train_through(folder / f"unaccumulated-{ranks}", device)}
    if ranks == 2:
        for kind, keys in KINDS.items():
            results[kind] = averages_and_checkpoints(folder / kind, device, **keys)
            results[f"skip {kind}"] = one_bad_batch(folder / f"skip-{kind}", device, **keys)
            results[f"half {kind}"] = first_half(folder / f"half-{kind}", device, **keys)
        results["accumulated"] = train_through(folder / "accumulated", device, micro_batch=2)
        results["stranger"] = strangers(folder / "zero-1", device)
        results["going_back"] = going_back(folder / "back", device)
        results["no_way_on"] = no_way_on(folder / "no-way-on", device)
        results["full_disk"] = [full_disk(folder / f"full-{rank}", device, rank) for rank in range(2)]
        results["without_a_shared_folder"] = without_a_shared_folder(folder / "apart", device)
        results["damaged"] = damaged(folder / "back", device)
    else:
        for kind, keys in KINDS.items():
            place = folder / f"half-{kind}-{ranks}"
            results[f"half {kind}"] = second_half(folder / f"half-{kind}", place, device, **keys)
        stage = {"zero_stage": 1}
        results["stage"] = second_half(folder / "half-zero-3", folder / f"stage-{ranks}", device, **stage)
        results["earlier"] = second_half(
            folder / "half-zero-1", folder / f"earlier-{ranks}", device, earlier=True, **stage
        )
        results["written_by"] = read_state(folder / "half-zero-1" / "retained" / "step-00000006").processes
    if dist.get_rank() == 0:
        write_json(folder / f"results-{ranks}.json", results)
    dist.barrier()
