"""One tiny run, made by the command line, and one tiny comparison, that the tests of this folder look at."""

import pytest
from tiny_images import configured
from tiny_run import STAGES, Tiny

from fm_core.stages.reproduce import reproduce


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    run = Tiny(tmp_path_factory.mktemp("tiny"))
    for stage in STAGES:
        run.first[stage] = run.fm(stage)
        assert run.first[stage].code == 0, run.first[stage].err
    return run


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """A finished comparison on images, not to be changed: (root, its StageResult, what was observed)."""
    root, seen = tmp_path_factory.mktemp("both"), []
    return root, reproduce(configured(root), seen.append), seen
