"""The words of errors, help texts, log lines and messages: those of the field, in US spelling."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

FILES = sorted([*(ROOT / "fm_core").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "infra").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
REPLACED = {
    r"mend(s|ed|ing)?": "fix",
    r"gr[ea]y levels?": "intensity levels",
    r"strangers?|refuse a stranger": "another run",
    r"setbacks?": "rollback",
    r"spoil[ts]?|spoiled|unusable": "damaged",
    r"judges?|judged": "feature extractor",
    r"impostors?": "out-of-distribution images",
    r"without a (last )?word|last word|farewell": "without an exit record",
    r"of nobody's": "",
    r"(?<!\.)\bcells? of the (comparison|paper)|image cells?": "experiment",
    r"house|rooms?(?! for\b)(?! there)": "package",
    r"duty|duties": "job",
    r"shel(f|ves)|piles?": "archive",
    r"is (still )?whole|are whole|whole checkpoints?": "complete",
    r"gave up|gives up": "failed",
    r"for good": "permanently",
    r"in sight|out of sight": "available, mounted",
    r"obey(s|ed)?": "apply, stop",
    r"stands? again": "appears twice",
    r"beats?\b|beating": "heartbeat",
    r"apart from": "except",
    r"images by number": "per-index seeding",
}
"""What is not said, and what is said instead where there is one word for it."""
CALLS = re.compile(r"(Error|StopRequested|Requested)$|\.(warning|error|info|exception)$|^print(_line)?$")
NOT_PROSE = {
    "fm_core/errors.py": ("gave up",),  # the word of exit records, which are files
    "fm_core/training/start_over.py": ("setback",),  # the name of a file
}
"""Names in files that are contracts."""


def text_of(node: ast.AST) -> str:
    """The literal parts of a string, an f-string or a sum of them."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)} {text_of(node.orelse)}"
    return ""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


def function_of(call: ast.Call) -> str:
    """The name that a call calls, with its last attribute."""
    function = call.func
    return f".{function.attr}" if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each error, log line, printed line and help text of a module."""
    helps = path.parent.name == "config" or path.stem == "command_options"
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and CALLS.search(function_of(node)):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                yield node.lineno, text_of(argument)
        elif isinstance(node, ast.keyword) and node.arg in ("help", "description", "epilog", "usage"):
            yield node.value.lineno, text_of(node.value)
        elif helps and isinstance(node, ast.Expr | ast.Dict):  # field docstrings, tables of options
            for value in node.values if isinstance(node, ast.Dict) else [node.value]:
                yield node.lineno, text_of(value)
        elif isinstance(node, ast.FunctionDef) and path.parent.name == "flows":
            yield node.lineno, ast.get_docstring(node) or ""


def refused_words(text: str) -> list[str]:
    return [match[0] for word in REPLACED for match in re.finditer(rf"\b(?:{word})\b", text, re.IGNORECASE)]


def test_errors_help_texts_and_messages_avoid_words_that_were_replaced():
    found: list[str] = []
    count = 0
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for line, text in texts_of(path):
            count += bool(text.strip())
            words = [word for word in refused_words(text) if word not in NOT_PROSE.get(name, ())]
            found += [f"{name}:{line}: {word}: {text}" for word in words]
    assert count > 700, "the collection no longer finds the texts"
    assert found == []


def test_the_first_lines_of_docstrings_avoid_them_too():
    found: list[str] = []
    for path in FILES:
        for node in nodes_of(path):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                found += [f"{path.relative_to(ROOT)}: {word}: {first}" for word in refused_words(first)]
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_avoid_them_too(page: Path):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert refused_words(prose) == []


def test_no_message_repeats_the_level_of_its_log_line():
    """The format of log lines has the level; a word in the text would be a second one."""
    repeated = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in FILES
        for line, text in texts_of(path)
        if re.match(r"\s*(warning|error|info)\s*:", text, re.IGNORECASE)
    ]
    assert repeated == []


def test_user_errors_are_one_line():
    broken = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in nodes_of(path)
        if isinstance(node, ast.Call) and function_of(node).endswith("UserError")
        if any("\n" in text_of(argument) for argument in node.args)
    ]
    assert broken == []


def test_spelling_is_that_of_the_united_states():
    """codespell with its table of British spellings; pyproject.toml lists the exceptions."""
    pytest.importorskip("codespell_lib", reason="codespell is not installed: bash infra/test.sh installs it")
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "--toml", "pyproject.toml", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0
