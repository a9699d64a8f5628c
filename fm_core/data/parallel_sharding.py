"""Writing a data set from several machines: begin once, write pieces anywhere, finish once.

Pieces may be written twice or by two at a time: the bytes are the same, and so is the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from fm_core.config.data import DataSection
from fm_core.data.dataset_builder import allowed_rejections, finish, read_complete
from fm_core.data.manifest import Manifest
from fm_core.data.shard_plan import PLAN_NAME, ShardPlan, ShardTask, make_plan, record_plan
from fm_core.data.shard_sidecar import COMMIT_FOLDER, read_sidecars, sidecar_path
from fm_core.data.shard_writer import jobs_of, missing_tasks, write_part
from fm_core.errors import UserError
from fm_core.storage.store import Store

MOST_PIECES = 256
"""More would be nothing but names in a list; each is several shards then."""


@dataclass(frozen=True)
class Piece:
    """What one process does in one go, as the plain stage shares it out."""

    name: str
    """Its first shard, and its last one if there are several."""
    shards: tuple[str, ...]
    """Names of the shards to write; of a part that is read from its beginning all that are missing."""
    images: int
    """Rows of the source, the unreadable ones included."""


class ParallelSharding:
    """What is to be written, and how much of it is."""

    def __init__(self, store: Store, plan: ShardPlan) -> None:
        self._store = store
        self._rows = {sidecar_path(task.name).rsplit("/", 1)[-1]: task.rows for task in plan.tasks}
        self.images = plan.images
        """Rows of the source."""
        self.pieces = _pieces(missing_tasks(store, plan)[0])
        """Those that lack shards, in the order of the shards."""

    def written(self) -> int:
        """Rows in shards that are committed now, by whomever; one listing."""
        marks = Store.at(self._store.url, COMMIT_FOLDER).sizes()
        return sum(rows for mark, rows in self._rows.items() if mark in marks)


def begin_dataset(config: DataSection) -> ParallelSharding | None:
    """Record what is to be made; None for a complete data set.

    Raises UserError if the source is missing or wrong, or another recipe is at this name.
    """
    if read_complete(config) is not None:
        return None
    store = Store.at(config.root, config.name)
    plan = make_plan(config)
    record_plan(store, plan)
    store.remove_stale_stages()
    return ParallelSharding(store, plan)


def write_piece(
    config: DataSection, shards: Sequence[str], on_images: Callable[[int], None] = lambda done: None
) -> int:
    """Write those of the shards that nobody has written meanwhile; the images written.

    on_images gets the images so far. Raises UserError if the source is damaged or the shards alone hold too
    many unreadable images.
    """
    store = Store.at(config.root, config.name)
    plan = _plan_of(config.model_dump_json(), store.read_bytes(PLAN_NAME))
    wanted = set(shards)
    done = rejected = 0
    for job in jobs_of([task for task in plan.tasks if task.name in wanted]):
        there = read_sidecars(store, [task.name for task in job])
        missing = [task for task in job if task.name not in there]
        for commit in write_part(store, plan, missing) if missing else ():
            done += commit.images
            rejected += len(commit.rejected)
            if rejected > allowed_rejections(plan, config):
                raise UserError(
                    f"data.max_quarantined: {rejected} images of {commit.name} and its neighbours cannot be "
                    f"used, the last {commit.rejected[-1].key}: {commit.rejected[-1].reason}"
                )
            on_images(done)
    return done


def finish_dataset(config: DataSection) -> Manifest:
    """The manifest, written now if every shard is; UserError that counts what is missing."""
    complete = read_complete(config)
    return complete or finish(Store.at(config.root, config.name), make_plan(config), config)


def _pieces(tasks: Sequence[ShardTask]) -> list[Piece]:
    jobs = jobs_of(tasks)
    several = ceil(len(jobs) / MOST_PIECES)
    grouped = [jobs[first : first + several] for first in range(0, len(jobs), several)] if jobs else []
    return [_piece([task for job in group for task in job]) for group in grouped]


def _piece(tasks: Sequence[ShardTask]) -> Piece:
    names = tuple(task.name for task in tasks)
    ends = dict.fromkeys(name.removesuffix(".tar") for name in (names[0], names[-1]))
    return Piece(" to ".join(ends), names, sum(task.rows for task in tasks))


@lru_cache(maxsize=1)
def _plan_of(config: str, recorded: bytes) -> ShardPlan:
    """A process that writes many pieces lists the source once; `recorded` is plan.json."""
    return make_plan(DataSection.model_validate_json(config))
