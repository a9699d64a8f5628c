"""Checkpoint saver: copies the sharded state to host memory and writes it while training continues.

Training pauses only while each rank copies its own shards. A thread on every rank then writes its shard of
the optimizer's state (see optimizer_writer.py) and sends its shards of the weights and the averages, piece by
piece in the order of the files, to rank 0, whose thread hashes and writes them as they arrive. Weights and
averages are complete files because other programs read them. The pieces go over a process group of their own,
so the hosts need not share a directory, and no rank holds more than its own shards and one piece. COMPLETE is
written when the files of all ranks are on the disk; until then the earlier checkpoints are the valid ones.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import Progress, no_progress
from fm_core.checkpoint.optimizer_shards import is_sharded
from fm_core.checkpoint.optimizer_writer import RankCopies, write_shards
from fm_core.checkpoint.tensor_layout import Fragment, TensorLayout
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.writer import Result, attempt
from fm_core.errors import LeaseLostError

POLL_SECONDS = 0.05
TIMEOUT = timedelta(days=7)
"""Of a transfer: a rank waits for the disk of another that does not answer; a dead rank is noticed."""


class SavedState(Protocol):
    """The tensors to save: named parts with one float32 tensor per parameter, in flat shards of the ranks."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of all parts, in the same order on all ranks; see checkpoint_loader.py."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by name, the same for all parts."""
        ...

    def fragments(self) -> Sequence[Fragment]:
        """Where this rank's shards hold elements of each parameter, the same for all parts."""
        ...

    def shards(self, part: str) -> Sequence[Tensor]:
        """Flat float32 shards of a part that this rank holds."""
        ...


@dataclass
class Save:
    """A checkpoint that is being written, or was."""

    state: TrainState
    catalog: CheckpointCatalog | None
    """On rank 0 only."""
    parts: Sequence[str]
    metadata: dict[str, str]
    last: bool
    """Whether training does not come here again, so that none can replace it."""
    before: "Save | None" = None
    """The one before it, of the same step; if that was a last one and failed, so does this one."""
    result: Result = None
    """The same on all ranks once the save is finished."""


class CheckpointSaver:
    """Saves of one trainer, each of one or several checkpoints of the same step."""

    def __init__(self, group: Any = None) -> None:
        """`group`: a gloo process group that is used for nothing else; None: there is one rank."""
        self._group = group
        self._rank, self._ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self._layout: TensorLayout | None = None
        self._copies: dict[str, list[Tensor]] = {}
        """Host memory for this rank's shards by part; kept, because new pages cost more than the copy."""
        self._allocation: threading.Thread | None = None
        self._copied: set[str] = set()
        self._saves: list[Save] = []
        """Those that were started and not taken, in order."""
        self._waiting: list[Save] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._at, self._moves = "", 0

    @classmethod
    def of_all_ranks(cls) -> Self:
        """A saver with a process group of all ranks, which must all call it."""
        return cls(dist.new_group(backend="gloo", timeout=TIMEOUT))

    def reserve(self, sharded: SavedState) -> None:
        """Allocate the host memory in a thread, so that the first save does not pause for it.

        All ranks must call it.
        """
        self._layout = TensorLayout.gathered(sharded.shapes, sharded.fragments(), self._group)
        parts, shards = sharded.parts, sharded.shards(sharded.parts[0])

        def allocate() -> None:
            if shards[0].is_cuda:  # otherwise page-locked memory would open a context on the first GPU
                torch.cuda.set_device(shards[0].device)
            for part in parts:
                self._copies[part] = [_host_memory(shard) for shard in shards]

        self._allocation = threading.Thread(target=allocate, name="checkpoint-memory", daemon=True)
        self._allocation.start()

    @property
    def step(self) -> int | None:
        """The step whose saves were started and not taken; None if there are none."""
        return self._saves[0].state.step if self._saves else None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing or sending. Raises what ended its thread unexpectedly."""
        with self._lock:
            if self._crash:
                raise RuntimeError("the thread that writes checkpoints has failed") from self._crash
            return self._thread is not None

    def start(
        self,
        sharded: SavedState,
        state: TrainState,
        catalog: CheckpointCatalog | None,
        recipe: dict[str, Any],
        parts: Sequence[str] | None = None,
        last: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy `parts`, by default all, and start to write them as a checkpoint; all ranks must call it.

        `catalog` is given on rank 0 only; `recipe` describes network, method and data, and is recorded in
        every file of tensors. `before` is called on rank 0 before anything is written, to sync the metrics
        that the checkpoint covers; an OSError that it raises is treated as a failure of the checkpoint.
        Saves of an earlier step must have been taken.
        """
        assert self.step in (None, state.step), "the copies of another step are still being written"
        state = state.model_copy(update={"processes": self._ranks})
        metadata = {"recipe": json.dumps({**recipe, "step": state.step, "images_seen": state.images_seen})}
        before_it = self._saves[-1] if self._saves else None
        save = Save(state, catalog, sharded.parts if parts is None else parts, metadata, last, before_it)
        self._copy(sharded, save.parts)
        if catalog:
            save.result = attempt(before)
        self._saves.append(save)
        with self._lock:
            self._waiting.append(save)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-saver", daemon=True)
                self._thread.start()

    def wait(self, progress: Progress = no_progress) -> None:
        """Wait until everything is written; `progress` is called whenever this rank has made some."""
        moves = self._moves
        while self.busy:
            if self._moves != moves:
                moves = self._moves
                progress(self._at)
            time.sleep(POLL_SECONDS)

    def take(self) -> list[Save]:
        """The saves in the order of their start; this rank must not be busy."""
        assert not self.busy
        saves, self._saves = self._saves, []
        self._copied.clear()
        return saves

    def close(self) -> None:
        """Finish what is being written, where that needs no other rank."""
        thread = self._thread
        if thread and self._ranks == 1:
            thread.join()

    @torch.no_grad()
    def _copy(self, sharded: SavedState, parts: Sequence[str]) -> None:
        if self._layout is None:
            self.reserve(sharded)
        if self._allocation:
            self._allocation.join()
            self._allocation = None
        on_device = False
        for part in parts:
            if part in self._copied:  # by another save of the same step
                continue
            shards = sharded.shards(part)
            if part not in self._copies:
                self._copies[part] = [_host_memory(shard) for shard in shards]
            for copy, shard in zip(self._copies[part], shards, strict=True):
                copy.copy_(shard, non_blocking=True)
                on_device = on_device or shard.is_cuda
            self._copied.add(part)
        if on_device:
            torch.cuda.synchronize()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                save = self._waiting.pop(0)
            try:
                if save.before and save.before.last:
                    save.result = save.before.result or save.result
                save.result = self._write(save)
            except BaseException as error:
                with self._lock:
                    self._crash = error
                return

    def _write(self, save: Save) -> Result:
        """Write one checkpoint together with the threads of the other ranks; all return the same."""
        assert self._layout
        catalog, step, result = save.catalog, save.state.step, save.result
        here = RankCopies(self._group, self._rank, self._ranks, self._layout, self._copies, self._progress)
        if catalog and not result:
            catalog.progress = self._progress
            result = attempt(lambda: catalog.begin(step))
        if sharded := [part for part in save.parts if is_sharded(part)]:
            writer = catalog.writer if catalog and not result else None
            problem = write_shards(here, writer, step, sharded, save.metadata)
            result = result or problem
        for part in (part for part in save.parts if not is_sharded(part)):
            content = here.content(part, here.layout.pieces)
            if catalog and not result:
                tensors = here.layout.empty_tensors()
                result = attempt(lambda: catalog.write(step, part, tensors, save.metadata, content))  # noqa: B023
            for _ in content:  # also after a failure, because the other ranks send the rest
                pass
        if catalog:
            result = result or attempt(lambda: catalog.finish(save.state))
            if result and not isinstance(result, LeaseLostError):
                catalog.discard(step)
        return here.gathered(result)[0]

    def _progress(self, at: str) -> None:
        self._at = at
        self._moves += 1


def _host_memory(shard: Tensor) -> Tensor:
    """Memory for a copy of a shard; its pages are already in place."""
    return torch.empty(shard.shape, dtype=torch.float32, pin_memory=shard.is_cuda).zero_()
