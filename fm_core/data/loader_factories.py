"""Factories for the sampler and the node cache of a configuration, and checks that they fit the job."""

import numpy as np

from fm_core.config.data import DataSection
from fm_core.data.cache import NodeCache
from fm_core.data.manifest import Manifest, Shard
from fm_core.data.sampler import BlockShuffleSampler, GlobalShuffleSampler, Sampler
from fm_core.errors import UserError
from fm_core.storage.store import Store


def make_order(
    config: DataSection, manifest: Manifest, split: str, seed: int, global_batch: int, ranks: int
) -> Sampler:
    """Create the sampler of data.order for one split; UserError for sizes that do not divide."""
    if config.order == "full":
        return GlobalShuffleSampler(seed, manifest.splits[split].images)
    run, rest = divmod(global_batch, config.virtual_ranks)
    if rest or not run:
        raise UserError(
            f"data.virtual_ranks: train.global_batch {global_batch} is not a multiple of "
            f"{config.virtual_ranks}"
        )
    block = manifest.packing.block_images
    sampler = BlockShuffleSampler(
        seed, block_sizes(manifest, split), config.virtual_ranks, run, window=config.window_blocks * block
    )
    sampler.check_world(ranks, global_batch)
    return sampler


def block_sizes(manifest: Manifest, split: str) -> list[int]:
    """Number of images in each block of a split, in id order; layout image is divided in the same way."""
    return [size for shard in manifest.split_shards(split) for size in _blocks_of(manifest, shard)]


def _blocks_of(manifest: Manifest, shard: Shard) -> list[int]:
    size = manifest.packing.block_images
    return [block.images for block in shard.blocks] or [
        min(size, shard.images - first) for first in range(0, shard.images, size)
    ]


def make_cache(config: DataSection, manifest: Manifest) -> NodeCache:
    """Create the node cache; UserError if it is too small for a shard, or for all with data.order full."""
    limit = config.cache_bytes
    if limit is not None and Store.at(config.root, config.name).local is None:
        # A tar with images of both splits is listed in both.
        needed = sum({shard.name: shard.bytes for shard in manifest.shards}.values())
        if config.order == "full" and limit < needed:
            raise UserError(
                f"data.cache_bytes: {limit} bytes do not hold the data set of {needed} bytes, which "
                "data.order full reads in random order; increase it or set data.order blocks"
            )
        largest = max(shard.bytes for shard in manifest.shards)
        if limit < largest:
            raise UserError(f"data.cache_bytes: {limit} bytes do not hold one shard of {largest} bytes")
    return NodeCache(config.cache, limit)


def check_streams(
    config: DataSection, manifest: Manifest, seed: int, global_batch: int, ranks: int, ranks_here: int
) -> None:
    """Check, before a process starts, that the sampler and the cache can serve `ranks` processes.

    ranks_here: number of ranks on one host. Raises UserError as make_order and make_cache do, and for a cache
    that cannot hold the shards which these ranks read at a time.
    """
    sampler = make_order(config, manifest, "train", seed, global_batch, ranks)
    limit = make_cache(config, manifest).limit_bytes
    if (
        limit is None
        or Store.at(config.root, config.name).local
        or not isinstance(sampler, BlockShuffleSampler)
    ):
        return
    shards = manifest.split_shards("train")
    sizes = np.array([shard.bytes for shard in shards], np.int64)
    shard_of = np.repeat(np.arange(len(shards)), [len(_blocks_of(manifest, shard)) for shard in shards])
    here = range(config.virtual_ranks * ranks_here // ranks)
    needed = max(int(sizes[np.unique(shard_of[blocks])].sum()) for blocks in sampler.blocks_at_a_time(here))
    if limit < needed:
        raise UserError(
            f"data.cache_bytes: {limit} bytes do not hold the {needed} bytes of shards that {ranks_here} "
            "processes of a host read at a time; increase it, or reduce data.window_blocks"
        )
