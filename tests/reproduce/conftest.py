"""Fixtures of the reproduce tests: one tiny comparison on images, and the same at few evaluations."""

import shutil

import pytest

from fm_core.commands import stage_function
from tests.support.tiny_image_comparison import FEW_STEPS, configured

reproduce = stage_function("reproduce")


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """A finished comparison on images, not to be modified: (root, its StageResult, observed progress)."""
    root, seen = tmp_path_factory.mktemp("both"), []
    return root, reproduce(configured(root), seen.append), seen


@pytest.fixture(scope="session")
def few_compared(compared, tmp_path_factory):
    """The tiny comparison, continued at few evaluations, not to be modified: (root, StageResult)."""
    root = tmp_path_factory.mktemp("few") / "root"
    shutil.copytree(compared[0], root)
    return root, reproduce(configured(root, few_steps=FEW_STEPS))
