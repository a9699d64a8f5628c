"""Fixtures of the sampling tests: a run with one checkpoint."""

import pytest

from tests.support.random_checkpoint import checkpoint, config_at


@pytest.fixture
def config(tmp_path):
    config = config_at(tmp_path)
    checkpoint(config)
    return config
