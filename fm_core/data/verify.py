"""Checking a written data set against its manifest."""

from collections.abc import Callable

from fm_core.data.manifest import Manifest, load_manifest
from fm_core.data.store import Store
from fm_core.errors import UserError


def verify_dataset(root: str, name: str) -> list[str]:
    """Re-hash every shard; what is wrong, a sentence each, empty when all is whole."""
    try:
        manifest = load_manifest(root, name)
    except UserError as error:
        return [str(error)]
    damaged = damaged_shards(Store.at(root, name), manifest)
    return [f"{shard}: {problem}; fm shard writes it again" for shard, problem in damaged.items()]


def damaged_shards(
    store: Store, manifest: Manifest, on_images: Callable[[int], None] = lambda done: None
) -> dict[str, str]:
    """Re-hash every shard; what is wrong, by shard name. on_images gets the images checked so far."""
    sizes = store.sizes()
    problems: dict[str, str] = {}
    done = 0
    for shard in manifest.shards:
        if shard.name not in sizes:
            problems[shard.name] = "missing"
        elif sizes[shard.name] != shard.bytes:
            problems[shard.name] = f"holds {sizes[shard.name]} bytes, not {shard.bytes}"
        elif store.sha256(shard.name) != shard.sha256:
            problems[shard.name] = "its SHA-256 is not the manifest's"
        done += shard.images
        on_images(done)
    return problems
