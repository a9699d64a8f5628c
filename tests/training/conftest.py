"""Jobs of engine_rank.py, each made once for all tests of this folder."""

import os

import pytest

from tests.support.forked_ranks import run_experiments


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Skip fsync: these tests kill processes, not machines."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="session")
def two_ranks(folder):
    return run_experiments("engine_rank", folder, 2, "results-2.json")


@pytest.fixture(scope="session")
def other_ranks(folder, two_ranks):
    """One, three and four processes, after two."""
    return {
        ranks: run_experiments("engine_rank", folder, ranks, f"results-{ranks}.json") for ranks in (1, 3, 4)
    }
