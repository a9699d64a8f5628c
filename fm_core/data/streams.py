"""The order and the cache that a configuration asks for."""

from fm_core.config.data import DataSection
from fm_core.data.batches import Order
from fm_core.data.block_order import BlockOrder
from fm_core.data.cache import NodeCache
from fm_core.data.manifest import Manifest
from fm_core.data.order import StreamOrder
from fm_core.data.store import Store
from fm_core.errors import UserError


def make_order(
    config: DataSection, manifest: Manifest, split: str, seed: int, global_batch: int, ranks: int
) -> Order:
    """The stream of data.order for one split; UserError for sizes that do not fit together."""
    if config.order == "full":
        return StreamOrder(seed, manifest.splits[split].images)
    run, rest = divmod(global_batch, config.virtual_ranks)
    if rest or not run:
        raise UserError(
            f"data.virtual_ranks: train.global_batch {global_batch} is no multiple of {config.virtual_ranks}"
        )
    block = manifest.packing.block_images
    order = BlockOrder(
        seed, block_sizes(manifest, split), config.virtual_ranks, run, window=config.window_blocks * block
    )
    order.check_world(ranks, global_batch)
    return order


def block_sizes(manifest: Manifest, split: str) -> list[int]:
    """Images of each block of a split, in order of ids; layout image is cut into blocks as well."""
    sizes: list[int] = []
    most = manifest.packing.block_images
    for shard in manifest.split_shards(split):
        sizes += [block.images for block in shard.blocks] or [
            min(most, shard.images - first) for first in range(0, shard.images, most)
        ]
    return sizes


def make_cache(config: DataSection, manifest: Manifest) -> NodeCache:
    """The node's cache; UserError if it is too small for an order that needs every shard all the time."""
    needed = sum(shard.bytes for shard in manifest.shards)
    remote = Store.at(config.root, config.name).local is None
    if remote and config.order == "full" and config.cache_bytes is not None and config.cache_bytes < needed:
        raise UserError(
            f"data.cache_bytes: {config.cache_bytes} bytes do not hold the data set of {needed} bytes, which "
            "data.order full reads all over; take data.order blocks or more space"
        )
    return NodeCache(config.cache, config.cache_bytes)
