"""Trainer: the objects and state that the training loop uses, on one rank."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.checkpoint_saver import CheckpointSaver
from fm_core.config import TrainSection
from fm_core.launch.worker_main import Rank
from fm_core.method.objectives import Objective
from fm_core.training.batch_source import BatchSource
from fm_core.training.ema import ModelEMA
from fm_core.training.hang_watchdog import HangWatchdog
from fm_core.training.train_log import TrainLog
from fm_core.training.validation_loss import ValidationLoss
from fm_core.training.zero_state import ZeroState


@dataclass
class Trainer:
    """Objects and state of the training loop on one rank."""

    train: TrainSection
    engine: Any
    objective: Objective
    averages: ModelEMA
    source: BatchSource
    rank: Rank
    device: torch.device
    recipe: dict[str, Any]
    """Network, method and data of the weights, recorded in every weights file."""
    conditional: bool
    """Whether the network sees the labels."""
    flops: float
    """FLOPs of one forward pass for one image."""
    checkpoints: CheckpointCatalog | None
    """On rank 0 only."""
    log: TrainLog | None
    """On rank 0 only."""
    snapshots: CheckpointCatalog | None = None
    """On rank 0 only: snapshots of the power-function averages, all of which are kept."""
    rollback_record: Path | None = None
    """On rank 0 only: the file that records a rollback."""
    validation: ValidationLoss | None = None
    """None if there are no validation images."""
    on_first_step: Callable[[], None] | None = None
    """On rank 0 only: called after the first applied step, and again after an OSError."""
    binding_failed: bool = False
    """Whether `on_first_step` has raised an OSError."""
    watchdog: HangWatchdog | None = None
    """None if hanging ranks are not detected."""
    completed: str | None = None
    """On rank 0 only: name of the last checkpoint that the run has completed, for messages."""
    snapshot_missing: bool = False
    """Whether the last snapshot could not be written."""
    step_start: float = field(default_factory=time.monotonic)
    """When the current step started."""
    control: Any = field(default_factory=lambda: dist.new_group(backend="gloo"))
    """Process group on the CPU, for collectives on values that are not on the device."""
    saver: CheckpointSaver = field(default_factory=CheckpointSaver.of_all_ranks)
    """Writes checkpoints and snapshots while training continues."""

    def heartbeat(self, at: str, patience: int = 1) -> None:
        """Report to the hang watchdog what all ranks do next, and how much longer than usual it may take."""
        if self.watchdog:
            self.watchdog.heartbeat(at, patience)

    @property
    def sharded(self) -> ZeroState:
        """The sharded tensors of a checkpoint."""
        return ZeroState(self.engine, self.averages.shards)
