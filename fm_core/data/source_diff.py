"""What the source would give today, hashed and thrown away."""

from itertools import groupby

from fm_core.data.manifest import Manifest
from fm_core.data.shard_format import ShardFile
from fm_core.data.shard_plan import ShardPlan


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, content: bytes | memoryview) -> int:
        return len(content)


def differing_shards(plan: ShardPlan, manifest: Manifest) -> list[str]:
    """Names of shards that would have another SHA-256, or that exist on one side only."""
    written = {shard.name: shard.sha256 for shard in manifest.shards}
    differing = sorted(set(written) - {task.name for task in plan.tasks})
    size = plan.packing.block_images
    for part, tasks in groupby(plan.tasks, key=lambda task: task.part):
        stream = plan.source.open(part)
        try:
            for task in tasks:
                shard = ShardFile(_Nowhere(), task.number, plan.packing.layout)
                for number, first in enumerate(range(0, task.rows, size)):
                    shard.add(number, stream.read(min(size, task.rows - first)))
                digest = shard.finish()
                if written.get(task.name) != (digest if shard.images else None):
                    differing.append(task.name)
        finally:
            stream.close()
    return differing
