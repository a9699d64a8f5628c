"""The table of failures of the operators' page: it is up to date, and each row names tests that cause it."""

import re

import pytest

from tests.support.failures import FAILURES, PAGE, functions_of, page_with_table


def test_the_page_holds_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert page_with_table(text) == text, "run: python -m tests.support.failures"


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.what)
def test_every_row_is_complete_and_its_tests_exist(failure):
    assert failure.happens
    assert failure.worst
    assert failure.tests
    for test in failure.tests:
        file, function = test.split("::")
        assert function in functions_of(file)


KINDS = (
    "disk",
    "clock",
    "server",
    "worker",
    "store",
    "launcher",
    "rank",
    "frozen",
    "network",
    "node",
    "memory",
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_of_failures_that_operators_meet_are_in_the_table(kind):
    assert any(re.search(rf"\b{kind}", failure.what) for failure in FAILURES)
