"""Fixtures of the checkpoint tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Processes are killed here, machines are not."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
