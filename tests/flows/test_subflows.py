"""Stages in flow runs of their own: a pool that cannot hold both is refused, a long wait is explained."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Late

from flows import subflows
from fm_core.errors import UserError


class Client:
    """A server with deployments in pools of some slots."""

    def __init__(self, own: str | None, pools: dict[str, int | None], deployed: str) -> None:
        self.own, self.pools, self.deployed = own, pools, deployed

    def read_flow_run(self, run: object) -> Any:
        return SimpleNamespace(work_pool_name=self.own)

    def read_deployment_by_name(self, name: str) -> Any:
        return SimpleNamespace(work_pool_name=self.deployed)

    def read_work_pool(self, name: str) -> Any:
        return SimpleNamespace(concurrency_limit=self.pools[name])


def check(
    monkeypatch: pytest.MonkeyPatch, own: str | None, slots: int | None, deployed: str = "local"
) -> None:
    @contextmanager
    def client(sync_client: bool):
        yield Client(own, {"local": slots, "cpu": 1}, deployed)

    monkeypatch.setattr(subflows, "get_client", client)
    monkeypatch.setattr(subflows, "flow_run", SimpleNamespace(get_id=lambda: str(uuid4())))
    subflows.check_slots(["shard"])


def test_a_pool_whose_only_slot_is_held_is_refused_in_one_line(monkeypatch):
    with pytest.raises(
        UserError, match="apart: shard-dataset/default is in the work pool local, whose only slot"
    ) as no:
        check(monkeypatch, "local", 1)
    assert "prefect work-pool set-concurrency-limit local 2" in str(no.value)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("own", "slots", "deployed"),
    [("local", 2, "local"), ("local", None, "local"), ("local", 1, "cpu"), (None, 1, "cpu")],
)
def test_other_pools_are_accepted(monkeypatch, own: str | None, slots: int | None, deployed: str):
    check(monkeypatch, own, slots, deployed)


def test_a_wait_names_the_pool():
    child = FlowRun(flow_id=uuid4(), name="calm-otter", state=Late(), work_pool_name="cpu")
    assert subflows.waiting_message(child) == (
        "flow run calm-otter is still Late: it waits for a worker or a free slot of the work pool cpu; "
        "see prefect work-pool inspect cpu"
    )
