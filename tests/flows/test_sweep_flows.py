"""Points of a sweep as flow runs: created with their configurations, waited for, cancelled, reported."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Failed, Running

from flows import subflows
from flows import sweep as sweep_flows
from fm_core.config import parse_config
from fm_core.errors import Outcome, StageEndedError, StopRequested
from fm_core.sweep.sweep_points import points_of

SWEEP = parse_config({"run": {"name": "r"}, "sweep": {"axes": {"sample.guidance": [1, 2, 3]}}}, where="x")
PARENT = "0f0e0d0c-0000-4000-8000-000000000000"


class Server:
    """A server whose flow runs end in the states of `ends`, one after another, at each poll of all."""

    def __init__(self, ends: list[State[Any]]) -> None:
        self.ends = ends
        self.created: list[dict[str, Any]] = []
        self.runs: dict[UUID, FlowRun] = {}
        self.reads: dict[UUID, int] = {}
        self.cancelled: list[UUID] = []

    def run_deployment(self, name: str, **keys: Any) -> FlowRun:
        child = FlowRun(id=uuid4(), flow_id=uuid4(), name=f"run-{len(self.runs)}", state=Running())
        self.created.append({"name": name, **keys})
        self.runs[child.id] = child
        return child

    def read_flow_run(self, run: UUID) -> FlowRun:
        number = list(self.runs).index(run)
        self.reads[run] = self.reads.get(run, 0) + 1
        ended = run in self.cancelled or self.reads[run] > number
        state = Cancelled() if run in self.cancelled else self.ends[number] if ended else Running()
        return self.runs[run].model_copy(update={"state": state})

    def set_flow_run_state(self, run: UUID, state: State[Any], force: bool = False) -> None:
        self.cancelled.append(run)


@pytest.fixture
def serve(monkeypatch):
    def started(*ends: State[Any]) -> Server:
        server = Server(list(ends))

        @contextmanager
        def client(sync_client: bool):
            yield server

        logger = SimpleNamespace(info=lambda *parts: None, debug=lambda *parts: None)
        monkeypatch.setattr(subflows, "run_deployment", server.run_deployment)
        monkeypatch.setattr(subflows, "get_client", client)
        monkeypatch.setattr(subflows, "get_run_logger", lambda: logger)
        monkeypatch.setattr(subflows, "flow_run", SimpleNamespace(get_id=lambda: PARENT))
        monkeypatch.setattr(subflows, "POLL_SECONDS", 0.0)
        return server

    return started


def test_every_point_is_a_flow_run_with_its_complete_configuration(serve):
    server, counts = serve(Completed(), Completed(), Completed()), []
    points = points_of(SWEEP)
    sweep_flows.run_points(points, lambda ended, message: counts.append((ended, message)))
    assert [run["name"] for run in server.created] == ["sweep-point/default"] * 3
    for run, point in zip(server.created, points, strict=True):
        assert parse_config(run["parameters"]["config"], where="x") == point.config
        assert run["parameters"]["stages"] == ["sample", "evaluate"]
        assert run["idempotency_key"].startswith(f"{PARENT}-{point.title}-")
        assert run["timeout"] == 0
    assert [ended for ended, _ in counts] == [1, 2, 3]
    assert counts[-1][1] == "3 of 3 flow runs ended"


def test_an_attempt_with_another_checkpoint_does_not_reuse_flow_runs(serve):
    keys = []
    for step in (1, 2, 2):
        server = serve(*[Completed()] * 3)
        newer = parse_config({**SWEEP.model_dump(mode="json"), "sample": {"step": step}}, where="x")
        sweep_flows.run_points(points_of(newer), lambda ended, message: None)
        keys.append([run["idempotency_key"] for run in server.created])
    assert not set(keys[0]) & set(keys[1])
    assert keys[1] == keys[2]


def test_all_remaining_flow_runs_are_cancelled_even_if_one_request_fails(serve):
    server = serve(*[Running()] * 3)
    cancel = server.set_flow_run_state

    def fails_for_the_first(run, state, force=False):
        if run == next(iter(server.runs)):
            raise RuntimeError("deleted")
        cancel(run, state, force)

    server.set_flow_run_state = fails_for_the_first

    def stop(ended, message):
        raise StopRequested("x")

    server.ends[0] = Completed()
    with pytest.raises(StopRequested):
        sweep_flows.run_points(points_of(SWEEP), stop)
    assert server.cancelled == list(server.runs)[1:]


def test_one_that_fails_is_reported_after_all_have_ended(serve):
    server = serve(Failed(message="no space"), Completed(), Completed())
    failed = sweep_flows.run_points(points_of(SWEEP), lambda ended, message: None)
    assert failed == {"guidance 1": "no space"}
    assert len(server.reads) == 3
    assert server.cancelled == []


def test_one_that_is_cancelled_ends_the_sweep_in_the_same_way(serve):
    serve(Completed(), Cancelled(message="by the operator"), Completed())
    with pytest.raises(StageEndedError, match="guidance 2: by the operator") as caught:
        sweep_flows.run_points(points_of(SWEEP), lambda ended, message: None)
    assert caught.value.outcome is Outcome.STOPPED


def test_a_request_to_stop_cancels_those_that_have_not_ended(serve):
    server = serve(Completed(), Completed(), Completed())

    def stop(ended: int, message: str) -> None:
        raise StopRequested("stopped")

    with pytest.raises(StopRequested):
        sweep_flows.run_points(points_of(SWEEP), stop)
    assert server.cancelled == list(server.runs)[1:]


def test_a_flow_run_that_cannot_be_created_cancels_those_before_it(serve, monkeypatch):
    server = serve(Running(), Running(), Running())

    def limited(name: str, **keys: Any) -> FlowRun:
        if len(server.runs) == 2:
            raise OSError("the server is full")
        return server.run_deployment(name, **keys)

    monkeypatch.setattr(subflows, "run_deployment", limited)
    with pytest.raises(OSError, match="full"):
        sweep_flows.run_points(points_of(SWEEP), lambda ended, message: None)
    assert server.cancelled == list(server.runs)


@pytest.mark.parametrize(("stages", "ended"), [(("sample", "evaluate"), 0), (("train", "sample"), 1)])
def test_a_cancelled_point_does_not_end_the_jobs_of_other_points_of_its_run(monkeypatch, stages, ended):
    calls, messages = [], []
    monkeypatch.setattr(sweep_flows, "end_remaining_jobs", lambda *parts: calls.append(parts))
    monkeypatch.setattr(sweep_flows, "set_final_message", lambda run, message: messages.append(message))
    config = points_of(SWEEP)[0].config.model_dump(mode="json")
    run = FlowRun(flow_id=uuid4(), name="x", parameters={"config": config, "stages": list(stages)})
    sweep_flows.end_jobs_of_point(sweep_flows.sweep_point, run, Cancelled())
    assert len(calls) == ended
    assert len(messages) == 1 - ended
    assert all("prefect flow-run retry" in message for message in messages)
