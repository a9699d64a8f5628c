"""Progress of a stage over time and with an unavailable server, by a replaced clock and server."""

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

from flows import progress_report as module
from flows.progress_report import ProgressReport, describe, finished
from fm_core.config import RunConfig
from fm_core.run.progress import Progress
from tests.support.operator import until

OUTAGE = 30
"""Failed updates: two minutes at PUBLISH_SECONDS."""


class ReplacedServer:
    """Holds the artifact; refuses every request while it is `away`."""

    def __init__(self) -> None:
        self.away, self.hangs, self.failures = False, threading.Event(), 0
        self.hangs.set()
        self.shown: list[tuple[float, str]] = []

    def request(self, *arguments: Any, description: str, **keys: Any) -> str:
        self.hangs.wait()
        assert PREFECT_CLIENT_MAX_RETRIES.value() == 0  # a client that retries would notice its return late
        if self.away:
            self.failures += 1
            raise httpx.ConnectError("nobody listens")
        self.shown.append((arguments[-1], description))
        return "an-id"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> ReplacedServer:
    server = ReplacedServer()
    monkeypatch.setattr(module, "create_progress_artifact", server.request)
    monkeypatch.setattr(module, "update_progress_artifact", server.request)
    monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("flow-run"))
    monkeypatch.setattr(module, "PUBLISH_SECONDS", 0.005)
    return server


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "a-run"}})


def step(number: int) -> Progress:
    return Progress("train", number, 1000, "images", f"step {number}")


def test_a_line_of_progress_is_logged_at_most_each_half_minute(server, config, caplog, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    report = ProgressReport("train", config)
    with caplog.at_level(logging.INFO):
        for second in range(1, 100):
            now = 1000.0 + second
            report(step(second))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f" {second // 10:2d}%  {describe(step(second))}" for second in (30, 60, 90)]


def test_the_artifact_catches_up_with_a_server_that_was_unavailable_for_two_minutes(server, config):
    with ProgressReport("train", config) as report:
        report(step(1))
        until(lambda: server.shown and server.shown[-1][1] == describe(step(1)), "it is shown")
        server.away = True
        number = 1
        while server.failures < OUTAGE:  # the stage's own thread never waits for the server
            number += 1
            report(step(number % 900))
        server.away = False
        report(step(950))
        until(lambda: server.shown[-1] == (95.0, describe(step(950))), "the artifact catches up")
    assert [percent for percent, _ in server.shown] == sorted(percent for percent, _ in server.shown)


def test_the_last_progress_of_a_stage_is_shown_before_it_ends(server, config):
    with ProgressReport("train", config) as report:
        report(step(1000))
    assert server.shown[-1] == (100.0, describe(step(1000)))


def test_the_final_progress_is_complete_also_where_no_total_was_known():
    assert finished(Progress("shard", 3, 8, "images", "", 2.0)) == Progress("shard", 8, 8, "images")
    assert finished(Progress("report", 0, 0, "")) == Progress("report", 1, 1, "stage")


def test_a_stage_ends_although_the_server_does_not_answer(server, config, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.05)
    server.hangs.clear()
    with ProgressReport("train", config) as report:
        report(step(1))
    assert server.shown == []
    server.hangs.set()
