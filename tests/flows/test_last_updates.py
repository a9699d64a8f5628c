"""Last updates of a stage reach a server that was unavailable, and no error ends the thread that
publishes."""

import logging
import threading
from pathlib import Path

import httpx
import pytest

from flows import artifacts, last_updates, progress_report
from flows.last_updates import LastUpdates, server_away
from flows.progress_report import ProgressReport
from fm_core.config import RunConfig
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.run.progress import Progress
from fm_core.run.results import StageResult

AWAY = httpx.ConnectError("All connection attempts failed")


class Server:
    """The artifacts that a server has, and what its next answers are: None for success, or an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[BaseException | None] = []
        self.bars: list[tuple[float, str]] = []
        self.answered = threading.Condition()
        monkeypatch.setattr(progress_report, "get_run_logger", lambda: logging.getLogger("a-flow-run"))
        monkeypatch.setattr(artifacts, "get_run_logger", lambda: logging.getLogger("a-flow-run"))
        monkeypatch.setattr(
            progress_report,
            "create_progress_artifact",
            lambda percent, key, description: self.put(percent, description),
        )
        monkeypatch.setattr(
            progress_report,
            "update_progress_artifact",
            lambda _, percent, description: self.put(percent, description),
        )
        monkeypatch.setattr(progress_report, "PUBLISH_SECONDS", 0.01)
        monkeypatch.setattr(progress_report, "last_updates", LastUpdates(60.0, 0.01))

    def put(self, percent: float, description: str) -> str:
        with self.answered:
            answer = self.answers.pop(0) if self.answers else None
            if answer:
                raise answer
            self.bars.append((percent, description))
            self.answered.notify_all()
        return "an-id"

    def wait_for(self, percent: float) -> None:
        with self.answered:
            assert self.answered.wait_for(lambda: self.bars and self.bars[-1][0] >= percent, 60)


@pytest.fixture
def server(monkeypatch) -> Server:
    return Server(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "r"}})


def test_a_stage_that_has_ended_well_is_shown_at_100_percent(server: Server, config: RunConfig):
    """Its last report may be older than its end, and the server may be away at that moment."""
    with ProgressReport("train", config) as report:
        report(Progress("train", 95, 100, "images", "step 95", rate=3.0))
        server.wait_for(95.0)
        server.answers = [AWAY] * 5
    progress_report.last_updates.wait_for_threads()
    assert server.bars[-1] == (100.0, "step 95, 100 of 100 images")


def test_a_stage_that_failed_is_shown_where_it_stood(server: Server, config: RunConfig):
    report = ProgressReport("sample", config).__enter__()
    report(Progress("sample", 3, 10, "images"))
    report.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert server.bars[-1] == (30.0, "3 of 10 images")


def test_an_update_that_the_server_refuses_is_not_repeated(server: Server, config: RunConfig):
    request = httpx.Request("POST", "http://server")
    refused = httpx.HTTPStatusError("no", request=request, response=httpx.Response(422, request=request))
    server.answers = [refused] * 1_000
    with ProgressReport("report", config) as report:
        pass
    report._thread.join(60)
    assert not report._thread.is_alive()


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), SystemExit(1), KeyError("x")])
def test_no_error_of_logs_or_events_ends_the_thread(server: Server, config: RunConfig, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(progress_report.LogDigest, "new_entries", fail)
    monkeypatch.setattr(progress_report.CheckpointEvents, "publish", fail)
    with ProgressReport("train", config) as report:
        for done in (10, 20, 30):
            report(Progress("train", done, 100, "images"))
            server.wait_for(float(done))


def test_warnings_of_the_package_reach_the_log_of_the_flow_run(server: Server, config: RunConfig, caplog):
    with ProgressReport("train", config):
        logging.getLogger("fm_core").warning("cannot ask for the job (%s); trying again", "squeue")
    assert [record.name for record in caplog.records if "cannot ask" in record.getMessage()].count(
        "a-flow-run"
    ) == 1
    assert not any(
        type(handler).__name__ == "_ForwardedWarnings" for handler in logging.getLogger("fm_core").handlers
    )


def test_artifacts_wait_for_the_server_in_order_and_a_broken_one_is_left_out(
    server, config, monkeypatch, caplog
):
    made: list[str] = []
    away = [AWAY, AWAY]

    def curve(config: RunConfig, result: StageResult) -> None:
        if away:
            raise away.pop()
        made.append("curve")

    def broken(config: RunConfig, result: StageResult) -> None:
        raise ValueError("nothing to draw")

    def table(config: RunConfig, result: StageResult) -> None:
        made.append("table")

    monkeypatch.setattr(artifacts, "ARTIFACTS", {"train": (curve, broken, table)})
    result = StageResult(stage="train", state="done", seconds=0.0, summary="")
    updates = LastUpdates(60.0, 0.01)
    artifacts.create_artifacts(config, result, updates)
    updates.wait_for_threads()
    assert made == ["curve", "table"]
    assert "could not create the artifact broken: nothing to draw" in caplog.text


def test_the_end_of_the_run_waits_within_its_bound_for_a_server_that_answers(monkeypatch):
    answers = [AWAY, AWAY, None]

    def ask() -> bool:
        if error := answers.pop(0):
            raise error
        return True

    monkeypatch.setattr(last_updates, "_healthy", ask)
    LastUpdates(60.0, 0.01).wait()
    assert answers == []
    answers = [AWAY] * 1_000
    LastUpdates(0.05, 0.01).wait()  # it is over


@pytest.mark.parametrize(
    ("status", "away"), [(200, False), (404, False), (422, False), (429, True), (500, True), (503, True)]
)
def test_which_answers_are_worth_another_try(status: int, away: bool):
    request = httpx.Request("GET", "http://server")
    error = httpx.HTTPStatusError("x", request=request, response=httpx.Response(status, request=request))
    assert server_away(error) is away
    assert server_away(httpx.ReadTimeout("slow"))
    assert server_away(ConnectionRefusedError())
    assert not server_away(ValueError("nothing to draw"))


def test_a_file_that_an_update_cannot_read_is_not_an_unavailable_server(tmp_path):
    with pytest.raises(UserError) as caught:
        load_manifest(str(tmp_path), "none")
    assert isinstance(caught.value.__context__, FileNotFoundError)
    assert not server_away(caught.value)
    assert not server_away(PermissionError(13, "Permission denied"))
