import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Processes are killed here, machines are not; hundreds of fsyncs would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
