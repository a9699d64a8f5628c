import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Skip fsync: these tests kill processes, not machines, and hundreds of fsyncs would take most time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
