"""One tiny comparison on images for all tests of this folder."""

import pytest

from fm_core.commands import stage_function
from tests.support.tiny_image_comparison import configured

reproduce = stage_function("reproduce")


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """A finished comparison on images, not to be changed: (root, its StageResult, what was observed)."""
    root, seen = tmp_path_factory.mktemp("both"), []
    return root, reproduce(configured(root), seen.append), seen
