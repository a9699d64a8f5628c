"""Two steps of each objective through the real engine: `torchrun -m tests.support.objectives_rank FOLDER`."""

import os
import sys
from pathlib import Path

from fm_core.checkpoint.train_state import TrainState
from fm_core.config import MethodSection
from fm_core.storage.atomic_files import write_json
from fm_core.training.engine import initialize_process_group
from fm_core.training.loop import run
from fm_core.training.validation_loss import ValidationLoss
from tests.support.trainer_lab import BATCH, full_weights, furthest, losses, make_trainer

VP = {"path": "variance-preserving"}
METHODS = {
    "flow-matching": {},
    "score-matching": VP,
    "scoreflow": VP,
    "noise-prediction": VP,
    "data-prediction": {},
    "maximum-likelihood": {"objective_options": {"method": "midpoint", "steps": 2}},
}


def two_steps(folder, device, objective, **over):
    method = MethodSection(objective=objective, **METHODS[objective])
    keys = {"images": 2 * BATCH, "log_images": BATCH, **over}
    trainer = make_trainer(folder, device, method=method, dropout=False, **keys)
    before = full_weights(trainer.engine)
    state = run(trainer, TrainState())
    moved = furthest(before, full_weights(trainer.engine))
    held_out = ValidationLoss(trainer.source, 5, BATCH).loss(trainer.engine, trainer.objective, False, device)
    end = {"steps": state.step, "applied": state.applied_steps, "moved": moved, "losses": losses(folder)}
    return {**end, "held_out": held_out}


if __name__ == "__main__":
    folder, device = Path(sys.argv[1]), initialize_process_group()
    found = {objective: two_steps(folder / objective, device, objective) for objective in METHODS}
    for words in ({"zero_stage": 2}, {"precision": "bf16"}):
        name = "maximum-likelihood " + " ".join(words)
        found[name] = two_steps(folder / name, device, "maximum-likelihood", **words)
    write_json(folder / "found-objectives.json", found)
    os._exit(0)
