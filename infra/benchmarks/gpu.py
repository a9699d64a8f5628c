"""All measurements on one GPU within a time limit; started by gpu.sh.

    bash infra/benchmarks/gpu.sh --wheels FOLDER          # at most 480 seconds on an H100 or H200
    bash infra/benchmarks/gpu.sh --continue               # the parts that the first call had no time for
    bash infra/benchmarks/gpu.sh --device cpu --size tiny # a trial run of the programs

Each part runs in its own process. If a part fails or takes too long, the reason is reported and the other
parts continue. Short parts run first; a part that is expected to end after the limit is skipped. The JSON is
written after each part. The table is written at the end, also into the page between its markers. The exit
status is 1 if a part failed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_parts import TOLERANCES, Part, all_parts
from interleaved import (
    ROOT,
    WORK,
    ChildFailedError,
    Contender,
    child,
    device_arguments,
    machine,
    parse_options,
)

PAGE = ROOT / "infra" / "docs" / "benchmarks.md"
MARKERS = "<!-- gpu.sh: begin -->", "<!-- gpu.sh: end -->"
PATIENCE = 3
"""A part is stopped after this many times its expected seconds, so that a hang leaves time for others."""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device_arguments(parser, ("full", "tiny"))
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything")
    parser.add_argument("--spent", type=float, default=0, help="seconds of them that are over already")
    parser.add_argument("--threads", type=int, default=4, help="CPU threads of each process")
    parser.add_argument("--part", nargs="+", help="only these parts or groups: unet, noise/philox-v1")
    parser.add_argument("--json", type=Path, default=WORK / "gpu.json", help="file for the measurements")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep what --json has measured")
    parser.add_argument("--page", type=Path, help="page for the table; on a GPU infra/docs/benchmarks.md")
    options = parse_options(parser)
    end = time.monotonic() + options.limit - options.spent
    parts = chosen(all_parts(options.device, options.size), options.part)
    if not parts:
        names = ", ".join(dict.fromkeys(part.group for part in all_parts(options.device, options.size)))
        parser.error(f"--part {' '.join(options.part)}: no such part; groups: {names}")
    facts = {"command": sys.argv[1:], "commit": commit(), "machine": machine(), "device": options.device}
    earlier = measured(options.json, facts) if options.go_on else {}
    rows = run(parts, facts, options.json, end, options.threads, earlier)
    text = table(parts, rows, facts)
    print(text)
    page = options.page or (PAGE if options.device == "cuda" else None)
    if page:
        write_table(page, text)
    print(f"\n{options.json}")
    sys.exit(any(row["state"] == "failed" for row in rows))


def chosen(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """Select the parts whose key or group is in `names`; without names, all parts."""
    return [part for part in parts if not names or part.key in names or part.group in names]


def measured(path: Path, facts: dict[str, Any]) -> dict[str, Row]:
    """Rows of an earlier call on the same machine and at the same commit, by key."""
    record = json.loads(path.read_text()) if path.exists() else {}
    if any(record.get(key) != facts[key] for key in ("commit", "machine", "device")):
        return {}
    return {row["part"]: row for row in record["rows"] if row["state"] == "measured"}


def run(
    parts: Sequence[Part],
    facts: dict[str, Any],
    path: Path,
    end: float,
    threads: int,
    earlier: dict[str, Row] | None = None,
) -> list[Row]:
    """Measure the parts one after another until `end` (of time.monotonic); write the JSON after each."""
    rows: list[Row] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        old = (earlier or {}).get(part.key)
        row = old if old and old["task"] == part.task else run_part(part, facts["device"], end, threads)
        rows.append(row)
        path.write_text(json.dumps({**facts, "rows": rows}, indent=1))
        print(
            f"{part.key}: {row['state']}{': ' + row['why'] if row['why'] else ''}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def run_part(part: Part, device: str, end: float, threads: int) -> Row:
    """Measure one part; its `state` is measured, failed or skipped, and `why` explains the latter two."""
    began = time.monotonic()
    left = end - began
    patience = min(left, PATIENCE * part.seconds) if device == "cuda" else left
    state, why, result = "skipped", "", {}
    if part.needs_gpu and device != "cuda":
        why = "needs a GPU"
    elif left < part.seconds:
        why = f"{part.seconds:g} s expected, {max(left, 0):.0f} s left"
    else:
        contender = Contender(part.task.get("contender", part.name), part.what)
        try:
            result = child(part.script, contender, threads, part.task, sys.executable, patience)
            state = "measured"
        except ChildFailedError as error:
            state, why = "failed", str(error)
        except subprocess.TimeoutExpired:
            state, why = "failed", f"stopped after {patience:.0f} s"
    spent = time.monotonic() - began
    return {"part": part.key, "state": state, "why": why, "spent": spent, **asdict(part), "result": result}


def table(parts: Sequence[Part], rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Markdown table of all rows, and the machine on which they were measured."""
    by_key = {row["part"]: row["result"] for row in rows if row["state"] == "measured"}
    bases = {part.group: by_key.get(part.key) for part in parts if part.reference}
    lines = [
        "| part | what | seconds | to the reference | images/s | MFU | peak GB | goal | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = bases.get(row["group"])
        note = row["why"] and f"{row['state']}: {row['why']}"
        cells = [row["part"], row["what"], *numbers(row, base), row["goal"], note or remark(row, base)]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    devices = ", ".join(facts["machine"]["devices"]) if facts["device"] == "cuda" else "no GPU"
    torch = facts["machine"]["versions"]["torch"]
    return "\n".join([*lines, "", f"Measured on: {devices}; torch {torch}; commit {facts['commit']}."])


def numbers(row: Row, base: Row | None) -> list[str]:
    """Table cells: seconds, ratio, images/s, MFU and peak memory; empty for missing values."""
    result = row["result"]
    if row["state"] != "measured":
        return [""] * 5
    timed = row["group"] != "losses"
    rate = result.get("images_per_s") if timed else None
    return [
        f"{result['seconds']:.3g}" if timed else "",
        f"{result['seconds'] / base['seconds']:.2f}" if base and timed and not row["reference"] else "",
        f"{rate:.4g}" if rate else "",
        f"{result['mfu']:.1%}" if result.get("mfu") else "",
        f"{result['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in result and timed else "",
    ]


def remark(row: Row, base: Row | None) -> str:
    """Results of a part besides its time: waiting for data, NFE, or the difference of its losses."""
    result = row["result"]
    if "waited" in result:
        return f"waits {result['waited']:.2%} of the time"
    if "nfe" in result:
        return f"NFE {result['nfe']}, batch {result['batch']}"
    if row["group"] == "losses" and not row["reference"]:
        if not base:
            return "no losses of the CPU to compare with"
        far = loss_difference(result["losses"], base["losses"])
        verdict = "within" if far <= TOLERANCES[row["name"]] else "OUTSIDE"
        return f"differs by {far:.1e}: {verdict} the tolerance"
    return ""


def loss_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference of two sequences of losses; infinite if a loss is missing or not finite."""
    if len(losses) != len(reference):
        return float("inf")
    pairs = zip(losses, reference, strict=True)
    far = [abs(a - b) / abs(b) if a is not None and b else float("inf") for a, b in pairs]
    return max(item if item == item else float("inf") for item in far)


def write_table(page: Path, text: str, markers: tuple[str, str] = MARKERS) -> None:
    """Replace the text between two markers of a page. Raises ValueError if they are missing."""
    content = page.read_text(encoding="utf-8")
    if [content.count(marker) for marker in markers] != [1, 1]:
        raise ValueError(f"{page}: the markers {' and '.join(markers)} are missing")
    before, rest = content.split(markers[0])
    after = rest.split(markers[1])[1]
    page.write_text(f"{before}{markers[0]}\n\n{text}\n\n{markers[1]}{after}", encoding="utf-8")


def commit() -> str | None:
    """Commit of the checkout; None outside of a repository."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()[:12] or None


if __name__ == "__main__":
    main()
