"""Tests of the tiers: a test that uses an expensive fixture is not a default test."""

import ast
from types import SimpleNamespace
from typing import cast

import pytest

from tests.support import ROOT
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
