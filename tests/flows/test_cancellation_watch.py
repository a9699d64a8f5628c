"""Reactions of a flow run's process to the states that it reads from the server."""

import os
import signal
import threading
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import StateType

from flows import cancellation_watch as module
from flows.cancellation_watch import CancellationWatch
from tests.support.operator import until


class ReplacedClient:
    """Answers reads with one state after another, then with the last; None is an unavailable server."""

    def __init__(self, *answers: tuple[StateType | None, int]) -> None:
        self.answers, self.reads, self.set = list(answers), 0, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def read_flow_run(self, run_id):
        kind, count = self.answers[min(self.reads, len(self.answers) - 1)]
        self.reads += 1
        if kind is None:
            raise httpx.ConnectError("nobody listens")
        return SimpleNamespace(state=SimpleNamespace(type=kind), run_count=count)

    def set_flow_run_state(self, run_id, state, force):
        self.set.append((state.type, force))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch):
    """Start a watch on a replaced server; signals and exits of this process are recorded.

    A thread that still reads would take an answer of the next test's server.
    """
    did: list[tuple] = []
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid4()))
    monkeypatch.setattr(module, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(os, "killpg", lambda group, number: did.append(("kill", number)))
    monkeypatch.setattr(os, "kill", lambda pid, number: did.append(("kill", number)))
    monkeypatch.setattr(os, "_exit", lambda status: did.append(("exit", status)))

    def start(*answers):
        client = ReplacedClient(*answers)
        monkeypatch.setattr(module, "get_client", lambda sync_client: client)
        return client, did, CancellationWatch()

    yield start
    until(lambda: all(thread.name != module.THREAD for thread in threading.enumerate()), "the last read")


@pytest.mark.parametrize("kind", [StateType.CANCELLING, StateType.CANCELLED])
def test_a_cancelled_run_gets_one_sigterm_even_where_the_server_was_unavailable(watched, kind: StateType):
    away = [(None, 1)] * 25  # two minutes at POLL_SECONDS
    client, did, watch = watched((StateType.RUNNING, 1), *away, (kind, 1))
    with watch:
        until(lambda: did, "the signal")
    assert did == [("kill", signal.SIGTERM)]
    assert client.reads == 27
    assert watch.cancelled()


def test_a_run_that_goes_on_gets_no_signal(watched):
    client, did, watch = watched((StateType.RUNNING, 1))
    with watch:
        until(lambda: client.reads > 5, "some reads")
        assert not watch.cancelled()
    assert did == []


def test_the_process_of_an_older_attempt_exits_and_changes_no_state(watched):
    client, did, watch = watched((StateType.RUNNING, 1), (StateType.RUNNING, 2))
    with watch:
        until(lambda: did, "the exit")
    assert did[0] == ("exit", 0)
    assert client.set == []


def test_a_live_run_that_stays_crashed_is_set_back_to_running(watched):
    client, did, watch = watched((StateType.RUNNING, 1), (StateType.CRASHED, 1), (StateType.CRASHED, 1))
    with watch:
        until(lambda: client.set, "the state")
    assert client.set[0] == (StateType.RUNNING, True)
    assert did == []


def test_a_run_that_was_crashed_for_one_read_is_not_changed(watched):
    client, did, watch = watched((StateType.RUNNING, 1), (StateType.CRASHED, 1), (StateType.RUNNING, 1))
    with watch:
        until(lambda: client.reads > 6, "some reads")
    assert (client.set, did) == ([], [])
