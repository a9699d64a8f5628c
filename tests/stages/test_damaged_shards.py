"""Training with two processes on a shard that was damaged after it was verified."""

import numpy as np
import pytest

from fm_core.data.manifest import load_manifest
from fm_core.launch.dispatch import processes_of, submitted
from tests.support.forked_ranks import forked_jobs
from tests.support.tiny_run import TinyRun, is_progress


@pytest.fixture
def trained_on_damage(tmp_path):
    """A run, its intact manifest, the damaged shard, and the output of training on it."""
    run = TinyRun(tmp_path, "spoilt", {"train": {"validation_images": 0}})
    assert run.fm("shard").code == 0
    manifest = load_manifest(run.config.data.root, "digits")
    shard = manifest.split_shards("train")[0]
    path = tmp_path / "data/digits" / shard.name
    content = np.fromfile(path, np.uint8)
    content[shard.blocks[0].x_offset :][: shard.blocks[0].x_bytes : 64] ^= 1  # a pixel of every image
    path.write_bytes(content.tobytes())
    with forked_jobs():
        return run, manifest, shard, run.fm("train", "--launch.restarts", "0")


def test_training_on_a_damaged_shard_ends_on_all_ranks_with_its_name_and_the_remedy(trained_on_damage):
    run, manifest, shard, called = trained_on_damage
    assert called.code == 2, called.err
    lines = [line for line in called.err.splitlines() if not is_progress(line)]
    assert len(lines) == 1, lines
    assert f"{shard.name}: image " in lines[0]
    assert lines[0].endswith("is damaged or missing; run fm validate --repair")
    assert processes_of(submitted(run.path)) == []
    assert not [*run.path.glob("train/checkpoints/step-*")]
    repaired = run.fm("validate", "--repair")
    assert repaired.code == 0, repaired.err
    assert load_manifest(run.config.data.root, "digits") == manifest
