"""Speed of reading and writing shards, compared with other formats.

    python infra/benchmarks/data.py                      # all measurements; installs the peers
    python infra/benchmarks/data.py --only ours memmap   # selected contenders
    python infra/benchmarks/data.py --memory             # peak memory over 1.28 M images (17 GB of disk)

The data are 50,000 crops of 64 x 64 pixels from real photographs. Each measurement is one shuffled pass in
its own process, with the files in the page cache. Rounds are interleaved, and medians are compared. Slow
readers read only the first --slow-images of a pass. Rates are images per second of wall time, and per second
of CPU time (including child processes), which is less sensitive to other load on the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# name: (description, whether it is slow)
READERS = {
    "ours": ("our shards, full permutation, prefetch thread, CRC of each image", False),
    "ours-direct": ("our shards, full permutation, no thread, CRC of each image", False),
    "wds-png-0": ("webdataset, PNG a sample, no worker", True),
    "wds-png-1": ("webdataset, PNG a sample, 1 worker", True),
    "wds-png-2": ("webdataset, PNG a sample, 2 workers", True),
    "mds-0": ("MDS raw, no worker", True),
    "mds-1": ("MDS raw, 1 worker", True),
    "mds-2": ("MDS raw, 2 workers", True),
    "litdata-0": ("litdata raw, no worker", False),
    "litdata-1": ("litdata raw, 1 worker", False),
    "litdata-2": ("litdata raw, 2 workers", True),
    "memmap": ("numpy memmap, random indices", False),
    "ram": ("gather from an array in RAM", False),
}
WRITERS = {
    "write-ours": ("writing our shards, SHA-256 and CRCs included", False),
    "write-wds-png": ("writing with webdataset.ShardWriter, PNG samples", True),
}
RESUMES = {
    "resume-ours": ("first batch at 90% of an epoch", False),
    "resume-wds": ("first batch at 90%, webdataset skipping undecoded samples", False),
}
ALL = {**READERS, **WRITERS, **RESUMES}

OURS = ("ours", "ours-direct")
# Our readers and the peers they are compared with; the fastest setting of each side counts.
TARGETS = (
    ("reading against webdataset PNG, its best", OURS, ("wds-png-0", "wds-png-1", "wds-png-2"), 40),
    ("reading against MDS raw, its best", OURS, ("mds-0", "mds-1", "mds-2"), 15),
    ("reading against litdata raw, its best", OURS, ("litdata-0", "litdata-1", "litdata-2"), 3),
    ("reading against numpy memmap", OURS, ("memmap",), 1.3),
    ("reading against RAM gather", OURS, ("ram",), 0.25),
    ("writing against ShardWriter PNG", ("write-ours",), ("write-wds-png",), 12),
    ("resuming against webdataset skipping", ("resume-ours",), ("resume-wds",), 100),
)

PEERS = (
    "mosaicml-streaming litdata Brotli python-snappy cramjam xxhash zstd lightning-utilities tifffile "
    "obstore catalogue oci"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "benchmark-data")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--slow-images", type=int, default=8_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--memory", action="store_true", help="measure memory over 1.28 M images instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.child:
        print(json.dumps(run_child(options)))
    elif options.memory:
        print(json.dumps(child(options, "memory"), indent=1))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    install_peers(options)
    for step in ("prepare", *(["prepare-peers"] if needs_peers(options) else [])):
        child(options, step)
    results: dict[str, list[dict]] = {name: [] for name in options.only}
    for number in range(options.rounds):
        for name in options.only:
            results[name].append(child(options, name))
            print(f"round {number + 1} {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    (options.work / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))


def table(results: dict[str, list[dict]]) -> str:
    def median(name: str, key: str) -> float:
        return statistics.median(row["images"] / row[key] for row in results[name])

    lines = ["| what | per second | per CPU-s |", "|---|---|---|"]
    for name in results:
        lines.append(f"| {ALL[name][0]} | {median(name, 'wall'):,.3g} | {median(name, 'cpu'):,.3g} |")
    lines += ["", "| work | at least | wall | CPU |", "|---|---|---|---|"]
    for row, ours, peers, least in TARGETS:
        ours_measured, peers_measured = (
            [name for name in side if results.get(name)] for side in (ours, peers)
        )
        if ours_measured and peers_measured:
            ratios = [
                max(median(name, key) for name in ours_measured)
                / max(median(name, key) for name in peers_measured)
                for key in ("wall", "cpu")
            ]
            lines.append(f"| {row} | {least}x | {ratios[0]:.2f}x | {ratios[1]:.2f}x |")
    return "\n".join(lines)


def needs_peers(options: argparse.Namespace) -> bool:
    return any(name.split("-")[0] in ("mds", "litdata") for name in options.only)


def install_peers(options: argparse.Namespace) -> None:
    """Install the peers in a separate folder, without dependencies, which would replace numpy and torch."""
    target = options.work / "peers"
    if needs_peers(options) and not (target / "litdata").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*command, *PEERS.split()], check=True)


def child(options: argparse.Namespace, name: str) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--work", str(options.work)]
    command += ["--images", str(options.images), "--slow-images", str(options.slow_images)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(options: argparse.Namespace) -> dict:
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import data_tasks

    slow = ALL.get(options.child, ("", False))[1]
    images = min(options.images, options.slow_images) if slow else options.images
    return data_tasks.run(options.child, options.work, images, options.images)


if __name__ == "__main__":
    main()
