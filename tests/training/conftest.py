"""Launches of engine_rank.py, each made once for all tests of this folder."""

import os

import pytest

from tests.support.rank_launch import launch


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Processes are killed here, machines are not."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="session")
def two(folder):
    return launch("engine_rank", folder, 2, "results-2.json")


@pytest.fixture(scope="session")
def others(folder, two):
    """One, three and four processes, after two."""
    return {ranks: launch("engine_rank", folder, ranks, f"results-{ranks}.json") for ranks in (1, 3, 4)}
