"""Text is read and written in UTF-8 whatever the locale: every call in the product names its encoding."""

import ast
import re
from collections.abc import Iterator

from tests.support import ROOT

FILES = [
    path
    for place in ("fm_core", "flows", "infra")
    for path in sorted((ROOT / place).rglob("*.py"))
    if "benchmarks" not in path.parts
]
TEXT_MODE = re.compile(r"[rwaxt+]+")


def without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write text in the encoding of the locale."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in keywords or None in keywords:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_method = isinstance(node.func, ast.Attribute)
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        mode = keywords.get("mode", ast.Constant(modes[-1] if modes else ""))
        text_mode = isinstance(mode, ast.Constant) and TEXT_MODE.fullmatch(str(mode.value))
        if (
            (is_method and name == "read_text")
            or (is_method and name == "write_text")
            or (name in ("open", "fdopen", "NamedTemporaryFile") and text_mode)
            or (name == "open" and "errors" in keywords)
            or (
                name in ("run", "Popen", "check_output")
                and ("text" in keywords or "universal_newlines" in keywords)
            )
        ):
            yield node.lineno


def test_every_text_file_and_every_text_of_a_process_has_an_encoding():
    assert len(FILES) > 150
    calls = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for line in without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert calls == []


def test_a_call_without_an_encoding_is_found():
    code = 'a.read_text()\nb.open("w")\nopen(c, "a")\nrun(d, text=True)\ne.open(errors="replace")\n'
    harmless = (
        'a.open("rb")\nstore.open(name)\na.read_text(encoding="utf-8")\nrun(d)\nwrite_text(path, text)\n'
    )
    assert sorted(without_encoding(ast.parse(code))) == [1, 2, 3, 4, 5]
    assert list(without_encoding(ast.parse(harmless))) == []
