"""Shard writer: each shard is staged, hashed, renamed, and then committed by its sidecar.

At any time the folder contains complete shards with a sidecar, and possibly shards without one, which are
treated as missing. The shards of one part are written in order by one process; parts, and shards of seekable
parts, are distributed over processes. The bytes do not depend on the number of processes.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import groupby
from typing import Any

import numpy as np

from fm_core.data.shard_format import ShardFile
from fm_core.data.shard_plan import ShardPlan, ShardTask
from fm_core.data.shard_sidecar import (
    PixelMoments,
    RejectedImage,
    ShardSidecar,
    moments_of,
    read_sidecars,
    sidecar_path,
)
from fm_core.data.sources.base import Samples
from fm_core.errors import UserError
from fm_core.storage.store import Store

OnShard = Callable[[int, int], None]
"""Called after each written shard with its numbers of rows and of rejected images."""
Job = tuple[ShardTask, ...]

# For less data, starting processes takes longer than writing.
WORTH_A_POOL_BYTES = 200e6


def write_tasks(
    store: Store, plan: ShardPlan, tasks: Sequence[ShardTask], workers: int, on_shard: OnShard
) -> None:
    """Write shards, in this process or in several; an exception of `on_shard` stops all."""
    jobs = jobs_of(tasks)
    workers = min(workers, len(jobs))
    size = plan.bytes * sum(task.rows for task in tasks) / max(1, plan.images)
    if workers > 1 and size > WORTH_A_POOL_BYTES and store.shared:
        _write_in_pool(store, plan, jobs, workers, on_shard)
        return
    for job in jobs:
        for sidecar in write_part(store, plan, job):
            on_shard(*_counts(sidecar))


def jobs_of(tasks: Sequence[ShardTask]) -> list[Job]:
    """Units of work for one process: a shard, or all shards of a part that is not seekable."""
    jobs: list[Job] = []
    for part, group in groupby(tasks, key=lambda task: task.part):
        if part.seekable:
            jobs += [(task,) for task in group]
        else:
            jobs.append(tuple(group))
    return jobs


def write_part(store: Store, plan: ShardPlan, tasks: Sequence[ShardTask]) -> Iterator[ShardSidecar]:
    """Write shards of one part, in order; yields the sidecar of each written shard.

    If the part turns out to be damaged, the sidecars of this call are removed, since an archive's CRC is
    checked last. Raises UserError for a damaged part.
    """
    stream = plan.source.open(tasks[0].part)
    row = 0
    written: list[str] = []
    try:
        for task in tasks:
            stream.skip(task.start - row)
            blocks = (
                stream.read(min(plan.packing.block_images, task.rows - first))
                for first in range(0, task.rows, plan.packing.block_images)
            )
            sidecar = write_shard(store, plan, task, blocks)
            written.append(task.name)
            row = task.start + task.rows
            yield sidecar
    except UserError:
        remove_sidecars(store, written)
        raise
    finally:
        stream.close()


def write_shard(store: Store, plan: ShardPlan, task: ShardTask, blocks: Iterable[Samples]) -> ShardSidecar:
    """Write one shard and its sidecar."""
    moments = PixelMoments()
    histogram = np.zeros(plan.classes.count or 0, np.int64)
    rejected: list[RejectedImage] = []
    with store.staged(task.name) as (_, file):
        shard = ShardFile(file, task.number, plan.packing.layout)
        for number, rows in enumerate(blocks):
            shard.add(number, rows)
            moments = moments.plus(moments_of(rows.images, plan.source.facts.levels))
            histogram += _histogram(task, rows, len(histogram))
            rejected += [RejectedImage(**vars(item)) for item in rows.rejected]
        sha256 = shard.finish()
    sidecar = ShardSidecar(
        name=task.name,
        split=task.split,
        bytes=shard.bytes,
        sha256=sha256,
        images=shard.images,
        blocks=tuple(shard.blocks),
        index_offset=shard.index_offset,
        class_histogram=tuple(histogram.tolist()) if plan.classes.count else None,
        moments=moments,
        rejected=tuple(rejected),
    )
    store.write_bytes(sidecar_path(task.name), (sidecar.model_dump_json() + "\n").encode())
    return sidecar


def remove_sidecars(store: Store, names: Iterable[str]) -> None:
    """Remove the sidecars of shards, which are then treated as missing."""
    for name in names:
        store.remove(sidecar_path(name))


def missing_tasks(store: Store, plan: ShardPlan) -> tuple[list[ShardTask], int]:
    """Tasks without a sidecar, and the number of images rejected in the others."""
    sidecars = read_sidecars(store, [task.name for task in plan.tasks])
    missing = [task for task in plan.tasks if task.name not in sidecars]
    return missing, sum(len(sidecar.rejected) for sidecar in sidecars.values())


def _counts(sidecar: ShardSidecar) -> tuple[int, int]:
    return sidecar.images + len(sidecar.rejected), len(sidecar.rejected)


def _histogram(task: ShardTask, rows: Samples, classes: int) -> Any:
    if rows.labels is None or not len(rows.labels):
        return 0
    if rows.labels.min() < 0 or rows.labels.max() >= classes:
        raise UserError(
            f"{task.part.name}: labels are {rows.labels.min()} .. {rows.labels.max()}; expected "
            f"0 .. {classes - 1}"
        )
    return np.bincount(rows.labels, minlength=classes)


def _write_in_pool(
    store: Store, plan: ShardPlan, jobs: Sequence[Job], workers: int, on_shard: OnShard
) -> None:
    # Spawned rather than forked, because the caller may have threads, of torch or Prefect.
    context = multiprocessing.get_context("spawn")
    reports: Any = context.SimpleQueue()
    stop = context.Event()
    with ProcessPoolExecutor(
        workers, context, _start_worker, (os.getpid(), store.url, plan, reports, stop)
    ) as pool:
        waiting: set[Future[None]] = {pool.submit(_run_job, job) for job in jobs}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                while not reports.empty():
                    on_shard(*reports.get())
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        while not reports.empty():
            on_shard(*reports.get())


_worker: tuple[Store, ShardPlan, Any, Any] | None = None


def _start_worker(parent: int, url: str, plan: ShardPlan, reports: Any, stop: Any) -> None:
    global _worker
    if sys.platform == "linux":
        # Writers must not outlive a killed parent; 1 is PR_SET_PDEATHSIG.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = Store.at(url), plan, reports, stop


def _run_job(job: Job) -> None:
    assert _worker is not None
    store, plan, reports, stop = _worker
    for sidecar in write_part(store, plan, job):
        reports.put(_counts(sidecar))
        if stop.is_set():
            return
