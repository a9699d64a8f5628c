"""Mutants of the source: small faults, each of which replaces one expression or statement.

Operators: flip a comparison or a sign, exchange an arithmetic or Boolean operator, swap two arguments, change
an integer by one, make a condition always false, drop a call or a `raise`, or lose a return value.
"""

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
UNTESTED_CALLS = {"debug", "info", "warning", "error", "print", "TypeVar", "getLogger"}
"""Names of calls whose removal does not change any result, for example because they only produce text."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: path relative to the root of the repository.
        line: first line of the changed code, from 1.
        start, end: byte offsets of the replaced code.
        new: the replacement code.
        operator: kind of fault.
    """

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str
    operator: str

    @property
    def name(self) -> str:
        """Unique name among all mutants of one version of the source."""
        return f"{self.file}:{self.line}:{self.operator}:{self.start}"

    def apply(self, source: bytes) -> bytes:
        """Return the source with this fault applied."""
        return source[: self.start] + self.new.encode() + source[self.end :]

    def record(self) -> dict[str, object]:
        """Return the mutant's entry for the results."""
        return asdict(self) | {"name": self.name}


def sample(root: Path, per_package: int, seed: int) -> list[Mutant]:
    """Draw mutants with a seed, equally many for each package of fm_core, its top level, and flows.

    A file is drawn with probability proportional to its size. Operators take turns; otherwise, most mutants
    would change an integer by one.
    """
    packages: dict[str, list[Path]] = {}
    for package in ("fm_core", "flows"):
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            packages.setdefault("/".join(file.split("/")[: 2 if file.count("/") > 1 else 1]), []).append(path)
    chosen: list[Mutant] = []
    for package, paths in sorted(packages.items()):
        generator = random.Random(f"{seed}:{package}")
        sizes = [path.stat().st_size for path in paths]
        operators = [name for name, _ in _OPERATORS]
        generator.shuffle(operators)
        of_package: list[Mutant] = []
        attempts = 0
        while len(of_package) < per_package and attempts < 50 * per_package:
            attempts += 1
            (path,) = generator.choices(paths, sizes)
            operator = operators[attempts % len(operators)]
            mutants = mutants_of(path.read_bytes(), path.relative_to(root).as_posix())
            candidates = [mutant for mutant in mutants if mutant.operator == operator]
            mutant = generator.choice(candidates) if candidates else None
            if mutant is not None and mutant not in of_package:
                of_package.append(mutant)
        chosen += of_package
    return chosen


def mutants_of(source: bytes, file: str) -> Iterator[Mutant]:
    """Yield all mutants of a file, in source order."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _mutable_nodes(tree):
        for operator, new in _replacements(node):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
            old = source[start:end].decode()
            yield Mutant(file, node.lineno, start, end, old, new, operator)


def _mutable_nodes(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yield expressions and statements inside functions, except annotations, defaults and messages."""

    def inside(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
        if isinstance(node, ast.JoinedStr | ast.Assert | ast.AnnAssign) and not getattr(node, "value", None):
            return
        if isinstance(node, ast.Raise):
            yield node  # the node can be dropped; its message is not mutated
            return
        if isinstance(node, ast.Call) and _called(node) in UNTESTED_CALLS:
            return
        if isinstance(node, ast.expr | ast.stmt):
            yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            children: list[ast.AST] = list(node.body)
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        else:
            children = list(ast.iter_child_nodes(node))
        for child in children:
            yield from inside(child)

    for function in _outermost_functions(tree):
        for statement in function.body:
            yield from inside(statement)


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost_functions(child)


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _replacements(node: ast.expr | ast.stmt) -> Iterator[tuple[str, str]]:
    """Yield (operator, new code) for each fault that this node allows."""
    for operator, build in _OPERATORS:
        new = build(node)
        if new is not None:
            code = ast.unparse(ast.fix_missing_locations(new))
            yield operator, code if isinstance(new, ast.stmt) else f"({code})"


def _comparison(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.Compare) or type(node.ops[0]) not in COMPARISONS:
        return None
    return ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)


def _arithmetic(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.BinOp) or type(node.op) not in ARITHMETIC:
        return None
    if isinstance(node.left, ast.Constant | ast.JoinedStr) and isinstance(
        getattr(node.left, "value", 0), str
    ):
        return None
    return ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)


def _boolean(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BoolOp):
        return ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    return None


def _sign(node: ast.AST) -> ast.AST | None:
    return node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else None


def _swap(node: ast.AST) -> ast.AST | None:
    if (
        not isinstance(node, ast.Call)
        or len(node.args) < 2
        or ast.dump(node.args[0]) == ast.dump(node.args[1])
    ):
        return None
    if any(isinstance(argument, ast.Starred) for argument in node.args[:2]):
        return None
    return ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)


def _off_by_one(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) <= 4096:
        return ast.Constant(node.value + 1)
    return None


def _never(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.IfExp):
        return node.orelse
    if isinstance(node, ast.If) and not node.orelse and len(node.body) <= 3:
        return ast.Pass()
    return None


def _drop(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Raise):
        return ast.Pass()
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return None if _called(node.value) in UNTESTED_CALLS else ast.Pass()
    return None


def _no_result(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Return) and node.value and not isinstance(node.value, ast.Constant):
        return ast.Return(ast.Constant(None))
    return None


_OPERATORS: list[tuple[str, Callable[[ast.AST], ast.AST | None]]] = [
    ("comparison", _comparison),
    ("arithmetic", _arithmetic),
    ("boolean", _boolean),
    ("sign", _sign),
    ("swapped-arguments", _swap),
    ("off-by-one", _off_by_one),
    ("skipped-check", _never),
    ("dropped-statement", _drop),
    ("lost-result", _no_result),
]
