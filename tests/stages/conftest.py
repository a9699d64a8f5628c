"""One tiny run, made by the command line, that the tests of this folder look at."""

import pytest
from tiny_run import STAGES, Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    run = Tiny(tmp_path_factory.mktemp("tiny"))
    for stage in STAGES:
        run.first[stage] = run.fm(stage)
        assert run.first[stage].code == 0, run.first[stage].err
    return run
