"""Fixtures: a sharded data set of real digits and its manifest."""

import pytest

from fm_core.config import RunConfig
from fm_core.data.manifest import load_manifest
from fm_core.stages.shard import shard


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> RunConfig:
    """Configuration of a run with a sharded data set."""
    root = tmp_path_factory.mktemp("digits")
    config = RunConfig.model_validate(
        {
            "run": {"root": str(root / "runs"), "name": "r"},
            "data": {"root": str(root / "data"), "name": "digits", "validation_images": 300},
        }
    )
    shard(config)
    return config


@pytest.fixture(scope="session")
def manifest(digits):
    return load_manifest(digits.data.root, digits.data.name)
