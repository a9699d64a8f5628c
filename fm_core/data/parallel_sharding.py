"""Sharding on several machines: begin once, write pieces anywhere, finish once.

Writing a piece twice, even concurrently, is harmless because the bytes are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from fm_core.config.data import DataSection
from fm_core.data.dataset_builder import allowed_rejections, read_complete, write_manifest
from fm_core.data.manifest import Manifest
from fm_core.data.shard_plan import PLAN_NAME, ShardPlan, ShardTask, make_plan, record_plan
from fm_core.data.shard_sidecar import SIDECAR_FOLDER, read_sidecars, sidecar_path
from fm_core.data.shard_writer import jobs_of, missing_tasks, write_part
from fm_core.errors import UserError
from fm_core.storage.store import Store

MAX_PIECES = 256
"""Target number of pieces; with more shards, a piece contains several."""


@dataclass(frozen=True)
class Piece:
    """Shards that one process writes in one call."""

    name: str
    """Name of the first shard, and of the last one if there are several."""
    shards: tuple[str, ...]
    """Names of the shards to write; all missing ones of a part that is not seekable."""
    images: int
    """Rows of the source, including unreadable ones."""


class ParallelSharding:
    """Pieces to write, and the joint progress of all processes."""

    def __init__(self, store: Store, plan: ShardPlan) -> None:
        self._store = store
        self._rows = {sidecar_path(task.name).rsplit("/", 1)[-1]: task.rows for task in plan.tasks}
        self.images = plan.images
        """Rows of the source."""
        self.pieces = _pieces(missing_tasks(store, plan)[0])
        """Pieces with missing shards, in the order of the shards."""

    def written(self) -> int:
        """Rows in the shards that all processes have written so far; costs one listing."""
        sidecars = Store.at(self._store.url, SIDECAR_FOLDER).sizes()
        return sum(rows for name, rows in self._rows.items() if name in sidecars)


def begin_dataset(config: DataSection) -> ParallelSharding | None:
    """Record the plan of the data set; None if it is already complete.

    Raises UserError if the source is missing or wrong, or a data set of another recipe has this name.
    """
    if read_complete(config) is not None:
        return None
    store = Store.at(config.root, config.name)
    plan = make_plan(config)
    try:
        record_plan(store, plan)
        store.remove_stale_stages()
        return ParallelSharding(store, plan)
    except BaseException:
        plan.source.release()
        raise


def write_piece(
    config: DataSection, shards: Sequence[str], on_images: Callable[[int], None] = lambda done: None
) -> int:
    """Write those shards that no process has written yet; returns the number of images written.

    on_images gets the number of images so far. Raises UserError if the source is damaged, or if these shards
    alone contain too many unreadable images.
    """
    store = Store.at(config.root, config.name)
    plan = _plan_of(config.model_dump_json(), store.read_bytes(PLAN_NAME))
    names = set(shards)
    done = rejected = 0
    for job in jobs_of([task for task in plan.tasks if task.name in names]):
        written = read_sidecars(store, [task.name for task in job])
        missing = [task for task in job if task.name not in written]
        for sidecar in write_part(store, plan, missing) if missing else ():
            done += sidecar.images
            rejected += len(sidecar.rejected)
            if rejected > allowed_rejections(plan, config):
                raise UserError(
                    f"data.max_quarantined: {rejected} images of {sidecar.name} and adjacent shards cannot "
                    f"be used, last {sidecar.rejected[-1].key}: {sidecar.rejected[-1].reason}"
                )
            on_images(done)
    return done


def finish_dataset(config: DataSection) -> Manifest:
    """Write the manifest once every shard is written, and return it; UserError if shards are missing."""
    complete = read_complete(config)
    if complete is not None:
        return complete
    plan = make_plan(config)
    try:
        return write_manifest(Store.at(config.root, config.name), plan, config)
    finally:
        plan.source.release()


def _pieces(tasks: Sequence[ShardTask]) -> list[Piece]:
    jobs = jobs_of(tasks)
    size = ceil(len(jobs) / MAX_PIECES)
    grouped = [jobs[first : first + size] for first in range(0, len(jobs), size)] if jobs else []
    return [_piece([task for job in group for task in job]) for group in grouped]


def _piece(tasks: Sequence[ShardTask]) -> Piece:
    names = tuple(task.name for task in tasks)
    ends = dict.fromkeys(name.removesuffix(".tar") for name in (names[0], names[-1]))
    return Piece(" to ".join(ends), names, sum(task.rows for task in tasks))


@lru_cache(maxsize=1)
def _plan_of(config: str, recorded: bytes) -> ShardPlan:
    """Plan of a configuration, cached so that a process with many pieces lists the source only once."""
    return make_plan(DataSection.model_validate_json(config))
