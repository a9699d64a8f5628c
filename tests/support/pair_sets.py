"""Sample sets of random weights, and the data set that their model is recorded to be trained on."""

from fm_core.config import RunConfig, merge
from fm_core.data.manifest import Manifest, Packing, Split
from fm_core.sampling.sample_store import SampleSet
from tests.support.random_checkpoint import SHAPE, checkpoint, config_at, make

EMPTY = Split(images=4, class_histogram=None, channel_mean=(0.0,), channel_std=(1.0,))


def dataset(shape: tuple[int, int, int] = SHAPE, levels: int = 17) -> Manifest:
    """The manifest of a data set without shards."""
    return Manifest(
        name="digits",
        levels=levels,
        image_shape=shape,
        class_count=10,
        label_order="digits",
        packing=Packing(block_images=4, shard_blocks=1),
        recipe={"source": "digits"},
        splits={"train": EMPTY, "val": EMPTY},
        shards=(),
    )


def finish(samples: SampleSet, manifest: Manifest) -> SampleSet:
    """Mark a set as complete, as the sample stage does."""
    facts = {"step": 7, "images": samples.images, "nfe": {"mean": 3}, "data_version": manifest.version}
    samples.finish(facts)
    return samples


def sample_set(root, manifest: Manifest | None = None, **sample_keys) -> tuple[SampleSet, RunConfig]:
    """A complete set of 11 samples in tars of 4, and the configuration of a student that trains on it."""
    config = config_at(root, **{"store": "float32", "seed": 3, **sample_keys})
    checkpoint(config)
    samples = finish(make(config), manifest or dataset())
    return samples, student(config, samples.store.url)


def student(config: RunConfig, place: str, **keys) -> RunConfig:
    """The configuration of a run that trains on the samples at a place; `keys` are sections."""
    tree = {
        "run": {"name": "student", "generator": "philox-v1"},
        "method": {"coupling": "reflow"},
        "data": {"pairs": {"samples": place, "validation_images": 2}},
        "train": {"global_batch": 4},
    }
    own = config.model_dump(exclude_unset=True)
    return RunConfig.model_validate(merge(merge(own, tree), keys))
