"""Fixture of the reproduce tests: one tiny comparison on images."""

import pytest

from fm_core.commands import stage_function
from tests.support.tiny_image_comparison import configured

reproduce = stage_function("reproduce")


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """A finished comparison on images, not to be modified: (root, its StageResult, observed progress)."""
    root, seen = tmp_path_factory.mktemp("both"), []
    return root, reproduce(configured(root), seen.append), seen
