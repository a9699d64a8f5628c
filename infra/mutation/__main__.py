"""Mutation testing: measure how many small faults the tests detect.

    python -m infra.mutation record --tier default       record the lines that each test executes (per tier)
    python -m infra.mutation run --seed 1 --per-package 5   try mutants; an interrupted run is continued
    python -m infra.mutation report                      list caught mutants and survivors

Each mutant is tried in a copy of the tree. The default tests that execute its lines are run, the fastest ones
first, until one fails that passes without the mutant. A survivor is then tried against the other tests of
`--all`. Results are stored in build/mutation/results.jsonl.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from infra.mutation.mutants import Mutant, sample
from infra.mutation.recording import ExecutedLines, record

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutation"
RESULTS = BUILD / "results.jsonl"
FAST_SECONDS = 10.0
"""Total recorded duration of the tests that are tried first, in seconds."""
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+)", re.MULTILINE)


def main() -> int:
    """Run the requested command."""
    parser = argparse.ArgumentParser(prog="python -m infra.mutation", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--tier", choices=["default", "all"], required=True)
    recording.add_argument("arguments", nargs="*", help="for pytest")
    running = commands.add_parser("run")
    running.add_argument("--seed", type=int, default=1)
    running.add_argument("--per-package", type=int, default=5)
    running.add_argument("--tier", choices=["default", "all"], default="all", help="the last one to try")
    commands.add_parser("report")
    options = parser.parse_args()
    if options.command == "record":
        arguments = [*(["--tier", "default"] if options.tier == "default" else []), *options.arguments]
        return record(ROOT, BUILD / options.tier, arguments)
    if options.command == "run":
        run(sample(ROOT, options.per_package, options.seed), options.tier)
    report()
    return 0


def run(mutants: list[Mutant], last_tier: str) -> None:
    """Try each mutant that has no result yet and append its result."""
    tree = _copy_of_the_tree()
    tiers = ["default", "all"][: 1 if last_tier == "default" else 2]
    maps = {tier: ExecutedLines.read(BUILD / tier / "lines.json") for tier in tiers}
    results = _results()
    for number, mutant in enumerate(mutants, 1):
        result = results.get(mutant.name, mutant.record() | {"tried": [], "killed by": None, "tier": None})
        tried = set(result["tried"])
        for tier in tiers:
            if tier in tried or result["killed by"]:
                continue
            seen = set(maps["default"].seconds) if tier == "all" else set[str]()
            last = mutant.line + mutant.old.count("\n")
            tests = [test for test in maps[tier].tests_of(mutant.file, mutant.line, last) if test not in seen]
            result[f"tests of {tier}"] = len(tests)
            killer = _first_failure(tree, mutant, tests, maps[tier].seconds)
            result["tried"].append(tier)
            if killer:
                result["killed by"], result["tier"] = killer, tier
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            outcome = killer or f"survives {result[f'tests of {tier}']} tests of {tier}"
            print(f"{number}/{len(mutants)} {mutant.name}: {outcome}", flush=True)


def report() -> None:
    """Print the fraction of mutants that each tier catches, and the survivors."""
    results = list(_results().values())
    caught = Counter(result["tier"] for result in results if result["killed by"])
    total = len(results)
    if not total:
        print("no mutant was tried yet")
        return
    of_all = sum(caught.values())
    print(
        f"{total} mutants; the default tests catch {caught['default']} ({caught['default'] / total:.0%}), ",
        end="",
    )
    print(f"all tests {of_all} ({of_all / total:.0%})")
    for result in results:
        if not result["killed by"]:
            print(f"survives {', '.join(result['tried'])}: {result['name']}")
            print(f"    {result['old']}\n    -> {result['new']}")


def _first_failure(tree: Path, mutant: Mutant, tests: list[str], seconds: dict[str, float]) -> str | None:
    """Return the first test that fails on the mutated tree only, or None; a timeout counts as a failure.

    Tests that fail without the mutant as well, because they need one that is not among these, are left out.
    """
    path, source = tree / mutant.file, (ROOT / mutant.file).read_bytes()
    for batch in _batches(tests, seconds):
        limit = 120 + 5 * sum(seconds[test] for test in batch)
        path.write_bytes(mutant.apply(source))
        try:
            failures = _failures(tree, batch, limit, "-x")
            if not failures:
                continue
            path.write_bytes(source)
            unrelated = _failures(tree, batch, limit)
            if not set(unrelated) <= set(batch):
                raise RuntimeError(f"without a mutant, the tests of {mutant.name} end so: {unrelated}")
            if failures[0] not in unrelated:
                return failures[0]
            path.write_bytes(mutant.apply(source))
            caught = [test for test in _failures(tree, batch, limit) if test not in unrelated]
            if caught:
                return caught[0]
        finally:
            path.write_bytes(source)
    return None


def _batches(tests: list[str], seconds: dict[str, float]) -> list[list[str]]:
    """The fastest tests, and all others; each in the order of the recording, in which tests may depend."""
    order = {test: number for number, test in enumerate(seconds)}
    fast, total = 0, 0.0
    while fast < len(tests) and total + seconds[tests[fast]] <= FAST_SECONDS:
        total += seconds[tests[fast]]
        fast += 1
    return [sorted(part, key=order.__getitem__) for part in (tests[:fast], tests[fast:]) if part]


def _failures(tree: Path, tests: list[str], limit: float, *options: str) -> list[str]:
    """Return those of these tests that fail, or why pytest ends otherwise; empty if all pass."""
    if not tests:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "-q", "-p", "no:cacheprovider", *tests],
            cwd=tree,
            env=_environment(tree),
            capture_output=True,
            encoding="utf-8",
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return [f"no end after {limit:.0f} s: {tests[0]} or one of {len(tests) - 1} others"]
    if "not found: " in done.stderr:
        raise RuntimeError(f"a recorded test does not exist: {done.stderr[:300]}; record again")
    if not done.returncode:
        return []
    # Lines of test ids, which may contain spaces, and exceptions.
    _, _, summary = done.stdout.rpartition("short test summary info")
    lines = FAILED.findall(summary)
    longest_first = sorted(tests, key=len, reverse=True)
    failed = [next((test for test in longest_first if line.startswith(test)), line) for line in lines]
    return failed or [f"pytest ends with status {done.returncode}: {done.stdout[-200:]}"]


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def _copy_of_the_tree() -> Path:
    """Create a copy of all files that git tracks or does not ignore."""
    tree = BUILD / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def _results() -> dict[str, dict]:
    """Return the most recent result of each mutant by name."""
    if not RESULTS.exists():
        return {}
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {record["name"]: record for record in records}


if __name__ == "__main__":
    sys.exit(main())
