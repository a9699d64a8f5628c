"""The words of errors, help texts, log lines and messages: those of the field, in US spelling."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.vocabulary import CLASSES, CONTRACTS, IDENTIFIERS, MODULES, PROSE

FILES = sorted([*(ROOT / "fm_core").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "infra").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
OF_THE_VOCABULARY = ("tests/support/vocabulary.py", "tests/test_plain_english.py")
"""Modules that contain the replaced words themselves."""
CALLS = re.compile(r"(Error|StopRequested|Requested)$|\.(warning|error|info|exception)$|^print(_line)?$")


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


def prose_of(source: str, nodes: Sequence[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, comment and other text of several words of a module.

    The texts include all errors, log lines, help texts and printed lines; an f-string is the text around its
    values.
    """
    inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        text = (
            text_of(node) if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in inner else ""
        )
        if text.count(" ") >= 1 or isinstance(node, ast.JoinedStr):
            yield node.lineno, " ".join(text.split())
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def identifiers_of(nodes: Sequence[ast.AST]) -> Iterator[tuple[int, str, bool]]:
    """Line and name of each variable, parameter, attribute, function and class; whether it is a class."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name, isinstance(node, ast.ClassDef)
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg, False
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id, False
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr, False


@cache
def prose_in(path: Path) -> Sequence[tuple[int, str]]:
    """The prose of a module of the project, which several tests read."""
    return list(prose_of(path.read_text(encoding="utf-8"), nodes_of(path)))


ANY = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern, _ in PROSE.values()), re.IGNORECASE)


def refused_words(text: str) -> list[str]:
    return [match[0] for match in ANY.finditer(text)]


def violations(source: str) -> list[str]:
    """Line and replaced word of everything in a text of Python that the vocabulary replaces."""
    nodes = list(ast.walk(ast.parse(source)))
    return refusals(prose_of(source, nodes), nodes)


def refusals(
    prose: Iterable[tuple[int, str]], nodes: Sequence[ast.AST], contracts: Collection[str] = ()
) -> list[str]:
    """Line and replaced word of prose and identifiers, except for those of contracts."""
    lines = [
        f"{line}: {word}: {text}"
        for line, text in prose
        for word in refused_words(text)
        if word.lower() not in contracts
    ]
    for line, name, is_class in identifiers_of(nodes):
        refused = CLASSES if is_class else IDENTIFIERS
        if name.strip("_") in refused and name not in contracts:
            lines.append(f"{line}: {name}")
    return lines


@pytest.mark.parametrize("folder", ["fm_core", "flows", "infra", "tests"])
def test_no_module_uses_a_word_that_was_replaced(folder: str):
    refused = [
        f"{name}:{violation}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (name := str(path.relative_to(ROOT))) not in OF_THE_VOCABULARY
        for violation in refusals(prose_in(path), nodes_of(path), CONTRACTS.get(name, ()))
    ]
    assert refused == []


def test_the_collection_has_every_message_of_the_program():
    """Every literal of several words in a call that raises, logs or prints, and in a help text."""
    count = 0
    for path in FILES:
        nodes = nodes_of(path)
        collected = "\n".join(text for _, text in prose_in(path))
        calls = [node for node in nodes if isinstance(node, ast.Call) and CALLS.search(function_of(node))]
        helps = [node for node in nodes if isinstance(node, ast.keyword) and node.arg == "help"]
        parts = [part for message in (*calls, *helps) for part in ast.walk(message)]
        for text in {part.value for part in parts if isinstance(part, ast.Constant)}:
            if isinstance(text, str) and text.strip().count(" ") > 1:
                assert " ".join(text.split()) in collected, f"{path}: {text}"
                count += 1
    assert count > 600


SOURCES = {
    "an error": 'def f():\n    raise UserError(f"data.name: {f} is WORD here")\n',
    "an error in parts": 'def f():\n    raise UserError("data.name: "\n        f"{f} is WORD")\n',
    "a log line": 'log.warning("the store of %s: WORD", 1)\n',
    "a help text": 'parser.add_argument("--x", help="how to WORD it")\n',
    "a printed line": 'print(f"{1} WORD")\n',
    "a docstring": 'def f():\n    """Return it.\n\n    Raises:\n        OSError: the WORD.\n    """\n',
    "the docstring of a key": 'class C:\n    key: int = 1\n    """Number of WORD images."""\n',
    "the docstring of a module": '"""Do it.\n\nWORD it.\n"""\n',
    "a comment": "x = 1  # WORD\n",
}


@pytest.mark.parametrize("place", SOURCES)
def test_each_replaced_word_is_refused_wherever_it_is(place: str):
    assert violations(SOURCES[place].replace("WORD", "plain")) == []
    for word in PROSE:
        assert violations(SOURCES[place].replace("WORD", word)), word
        assert violations(SOURCES[place].replace("WORD", word.capitalize())), word


@pytest.mark.parametrize(
    "source",
    [
        "NAME = 1",
        "def NAME(): ...",
        "def f(NAME): ...",
        "a.NAME = 1",
        "for NAME in x: ...",
        "with x as NAME: ...",
    ],
)
def test_each_replaced_identifier_is_refused(source: str):
    assert violations(source.replace("NAME", "plain")) == []
    for name in IDENTIFIERS:
        assert violations(source.replace("NAME", name)), name
        assert violations(source.replace("NAME", f"_{name}")), name


def test_each_replaced_class_is_refused():
    assert [name for name in CLASSES if not violations(f"class {name}: ...")] == []


def test_no_module_has_a_name_that_was_replaced():
    names = [
        *FILES,
        *(ROOT / "tests" / "support").glob("*.py"),
        *(ROOT / "infra" / "chaos_faults").glob("*.py"),
    ]
    assert [str(path.relative_to(ROOT)) for path in names if path.stem in MODULES] == []


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
