"""Context of an episode, on which faults act: the run, its disks, its store, and the other host."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from infra.chaos_faults.disks import ChaosDisk
from infra.chaos_faults.namespaces import ProcessHost
from infra.chaos_faults.preload import Preload
from infra.chaos_faults.store_server import ObjectStore
from infra.chaos_faults.tiny_training import RunProcess, TinyTraining, TrainingStart, read_record


class NotNowError(Exception):
    """A fault cannot be injected at this moment."""


@dataclass
class EpisodeContext:
    """The parts of one episode."""

    training: TinyTraining
    run_disk: ChaosDisk
    checkpoint_disk: ChaosDisk | None
    """None if checkpoints are in the store."""
    preload: Preload | None
    store: ObjectStore | None
    other_host: ProcessHost | None
    host: ProcessHost | None = None
    """Host on which the operator starts the run; None: this one."""

    def live(self, role: str | None = None) -> list[RunProcess]:
        """The live processes of the run, or those with a role. NotNowError without any."""
        matches = [member for member in self.training.processes() if role in (None, member.role)]
        if not matches:
            raise NotNowError(f"no {role or 'process'} lives")
        return matches

    def start(self) -> TrainingStart:
        """Start the run on the operator's present host."""
        return self.training.start(host=self.host)

    @property
    def run_folder(self) -> Path:
        """The run directory, whether or not it is mounted."""
        return self.run_disk.backing

    def epoch(self) -> int:
        """The epoch of the lease."""
        record = read_record(self.run_disk.backing / "lock")
        return record["epoch"] if record else 0

    def status_job(self) -> str | None:
        """The job that wrote status.json last."""
        return (read_record(self.run_disk.backing / "status.json") or {}).get("job")

    def lines(self) -> int:
        """Number of lines of the metrics."""
        try:
            return (self.run_disk.backing / "train" / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def has_completed(self) -> bool:
        """Whether a checkpoint is complete, and its root is owned by this run.

        Before that, a start with empty mount points cannot be distinguished from the first start of a new
        run.
        """
        history = read_record(self.run_disk.backing / "train" / "history.json") or {}
        return history.get("completed_step") is not None and (self.store is None or self.store.owned())


@dataclass
class ActiveFault:
    """A fault that was injected."""

    kind: str
    detail: str
    heal: Callable[[], object] = lambda: None
    """Undo it."""
    seconds: float = 0.0
    """Duration in seconds."""
    is_over: Callable[[], bool] = lambda: False
    """Whether it may be undone earlier."""
    occurred: Callable[[], bool] = lambda: True
    """Called after `heal`: whether the fault had any effect."""
    exclusive: bool = False
    """Whether no other fault is injected and nothing is started while it is active."""
    began: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether it is time to undo it."""
        return time.monotonic() - self.began >= self.seconds or self.is_over()


Inject = Callable[[EpisodeContext, Random], ActiveFault]


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault."""

    name: str
    inject: Inject
    """Raises NotNowError if it cannot be injected at the moment."""
    needs: frozenset[str] = frozenset()
    """Capabilities: mounts, network, hosts, compiler, store."""
    episodes: str = "all"
    """folder or store: only in episodes whose checkpoints are there."""
