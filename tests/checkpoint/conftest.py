"""Fixtures of the checkpoint tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Skip fsync: these tests kill processes, not machines."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
