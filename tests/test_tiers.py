"""Tests of the tiers (a test that uses an expensive fixture is no default test) and of the distribution."""

import ast
from types import SimpleNamespace
from typing import cast

import pytest
from xdist.workermanage import WorkerController

from tests.support import ROOT
from tests.support.scheduling import LONGEST, SHARED, WAITING, Grouped
from tests.support.tiers import EXTENDED, keep_default, summary, tier_of


def test_one_expensive_fixture_makes_a_test_an_extended_one():
    assert tier_of(("tmp_path", "demo")) == EXTENDED["demo"]
    assert tier_of(("tmp_path", "monkeypatch")) is None


def test_extended_tests_are_removed_and_counted():
    items = [SimpleNamespace(fixturenames=names) for names in (["tmp_path"], ["pair"], ["pair", "demo"], [])]
    remaining = cast(list[pytest.Item], list(items))
    removed = keep_default(remaining)
    assert remaining == [items[0], items[3]]
    assert dict(removed) == {EXTENDED["pair"]: 1, EXTENDED["demo"]: 1}
    assert summary(removed).startswith("--all adds 2 tests: ")


def test_every_expensive_fixture_exists():
    names: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
            if any("fixture" in ast.unparse(decorator) for decorator in decorators):
                names.add(cast(ast.FunctionDef, node).name)
    assert set(EXTENDED) <= names


class Node:
    """A process of a session, by its number."""

    def __init__(self, number: int) -> None:
        self.gateway = SimpleNamespace(id=f"gw{number}")


def grouped(processes: int, waiting_process: bool) -> tuple[Grouped, list[WorkerController]]:
    nodes = cast(list[WorkerController], [Node(number) for number in range(processes)])
    scheduling = object.__new__(Grouped)
    scheduling.config = cast(pytest.Config, SimpleNamespace(getoption=lambda name: waiting_process))
    scheduling.assigned_work = {node: {} for node in reversed(nodes)}
    return scheduling, nodes


def test_the_last_process_takes_only_groups_that_wait():
    scheduling, (first, second, last) = grouped(3, waiting_process=True)
    waiting = sorted(WAITING)[:2]
    groups = ["tests/a.py", waiting[0], "tests/b.py", waiting[1]]
    assert scheduling._next_group(last, groups) == waiting[0]
    assert scheduling._next_group(last, ["tests/b.py"]) is None
    assert [scheduling._next_group(node, groups[1:]) for node in (first, second)] == ["tests/b.py"] * 2
    assert scheduling._next_group(first, waiting) == waiting[0], "what is left in the end"
    alone, (only,) = grouped(1, waiting_process=True)
    assert alone._next_group(only, groups) == groups[0]


def test_without_such_a_process_groups_begin_in_their_order():
    scheduling, nodes = grouped(2, waiting_process=False)
    groups = [sorted(WAITING)[0], "tests/a.py"]
    assert {scheduling._next_group(node, groups) for node in nodes} == {groups[0]}


def test_every_path_of_the_distribution_exists():
    paths = {*WAITING, *LONGEST, *(path for group in SHARED.values() for path in group)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_no_process_takes_the_place_of_the_waiting_one_after_its_end():
    scheduling, (first, second, last) = grouped(3, True)
    normal = ["tests/models/test_unet.py"]
    assert scheduling._next_group(last, normal) is None
    del scheduling.assigned_work[last]
    assert scheduling._next_group(second, normal) == normal[0]
    assert scheduling._next_group(first, normal) == normal[0]
