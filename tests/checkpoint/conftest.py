"""What the tests of checkpoints share."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Processes are killed here, machines are not."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
