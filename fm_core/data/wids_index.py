"""Shard indexes for other WebDataset tools, with the number of samples (distinct keys) of each tar.

<split>.wids.json is the shard index of wids, sizes.json that of open_clip. In layout block a sample is a
block, so both count blocks.
"""

import json

from fm_core.data.manifest import Manifest, Shard
from fm_core.storage.store import Store


def write_indexes(store: Store, manifest: Manifest) -> None:
    """Write both indexes next to the shards."""
    sizes = {shard.name: samples_of(shard) for shard in manifest.shards}
    store.write_bytes("sizes.json", (json.dumps(sizes, indent=1) + "\n").encode())
    for split in manifest.splits:
        index = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": f"{manifest.name}-{split}",
            "shardlist": [
                {"url": shard.name, "nsamples": samples_of(shard), "filesize": shard.bytes}
                for shard in manifest.split_shards(split)
            ],
        }
        store.write_bytes(f"{split}.wids.json", (json.dumps(index, indent=1) + "\n").encode())


def samples_of(shard: Shard) -> int:
    """Number of samples in a shard, as WebDataset groups its members."""
    return len(shard.blocks) or shard.images
