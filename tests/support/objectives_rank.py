"""Two steps of each objective through the real engine, on a forked rank (forked_ranks.py)."""

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
    "meanflow": {"objective_options": {"equal_times": 0.5}},
    "split-meanflow": {"objective_options": {"equal_times": 0.5}},
}


def two_steps(folder, device, objective, **over):
    method = MethodSection(objective=objective, **METHODS[objective])
    keys = {"images": 2 * BATCH, "log_images": BATCH, **over}
    trainer = make_trainer(folder, device, method=method, dropout=False, **keys)
    before = full_weights(trainer.engine)
    state = run(trainer, TrainState())
    moved = furthest(before, full_weights(trainer.engine))
    validation_loss = ValidationLoss(trainer.source, 5, BATCH).loss(
        trainer.engine, trainer.objective, False, device
    )
    end = {"steps": state.step, "applied": state.applied_steps, "moved": moved, "losses": losses(folder)}
    return {**end, "validation_loss": validation_loss}


def main(path):
    folder, device = Path(path), initialize_process_group()
    results = {objective: two_steps(folder / objective, device, objective) for objective in METHODS}
    for keys in ({"zero_stage": 2}, {"precision": "bf16"}):
        name = "maximum-likelihood " + " ".join(keys)
        results[name] = two_steps(folder / name, device, "maximum-likelihood", **keys)
    write_json(folder / "results-objectives.json", results)
