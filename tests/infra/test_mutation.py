"""Tests of the mutants, and of the choice of the tests that are tried on them."""

import pytest

from infra.mutation.mutants import mutants_of, sample
from infra.mutation.recording import ExecutedLines
from tests.support import ROOT

SOURCE = '''
LIMIT = 3


def f(a: int, b: int = 2) -> int:
    """Text."""
    if a < 0:
        raise ValueError(f"{a} is negative: {a + 1}")
    check(a, b)
    log.warning("%d", a - b)
    return -a * g(b, a) if a and not b else b[1]
'''


@pytest.mark.parametrize(
    ("operator", "changes"),
    [
        ("comparison", {"(a <= 0)"}),
        ("arithmetic", {"(-a / g(b, a))"}),
        ("boolean", {"(a or not b)", "(b)"}),
        ("sign", {"(a)"}),
        ("swapped-arguments", {"(check(b, a))", "(g(a, b))"}),
        ("off-by-one", {"(1)", "(2)"}),
        ("skipped-check", {"pass", "(b[1])"}),
        ("dropped-statement", {"pass"}),
        ("lost-result", {"return None"}),
    ],
)
def test_each_operator_makes_its_faults_and_no_fault_in_texts(operator, changes):
    mutants = [mutant for mutant in mutants_of(SOURCE.encode(), "f.py") if mutant.operator == operator]
    assert {mutant.new for mutant in mutants} == changes
    for mutant in mutants:
        assert mutant.old in SOURCE
        compile(mutant.apply(SOURCE.encode()), "f.py", "exec")


def test_a_sample_is_repeatable_covers_every_room_and_compiles():
    mutants = sample(ROOT, per_package=2, seed=3)
    assert mutants == sample(ROOT, per_package=2, seed=3)
    assert mutants != sample(ROOT, per_package=2, seed=4)
    packages = {path.name for path in (ROOT / "fm_core").iterdir() if (path / "__init__.py").exists()}
    assert {mutant.file.split("/")[1] for mutant in mutants if mutant.file.count("/") > 1} >= packages
    assert any(mutant.file.startswith("flows/") for mutant in mutants)
    for mutant in mutants:
        compile(mutant.apply((ROOT / mutant.file).read_bytes()), mutant.file, "exec")


def test_the_quickest_tests_that_execute_a_line_come_first():
    executed = ExecutedLines(
        {"f.py": {3: ["slow", "fast"], 4: ["other"]}}, {"slow": 9.0, "fast": 1.0, "other": 2.0}
    )
    assert executed.tests_of("f.py", 3, 3) == ["fast", "slow"]
    assert executed.tests_of("f.py", 3, 4) == ["fast", "other", "slow"]
    assert executed.tests_of("f.py", 90, 90) == [
        "fast",
        "other",
        "slow",
    ]  # executed at import: all of the file
    assert executed.tests_of("g.py", 1, 1) == []
