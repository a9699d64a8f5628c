"""How long commands, trainings and flow runs take to start, against another checkout of this project.

    git worktree add build/earlier COMMIT
    python infra/benchmarks/start_up.py build/earlier

Both checkouts run in this Python's environment, in turns. `fm train` is measured to its first optimizer step,
of two ranks on digits. A Prefect server of its own is started on loopback; what Prefect itself needs is
measured with as many empty flows and subtracted, so that `deploy` and `flow run` are this project's share.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {
    "data": {"name": "digits", "source": {"format": "digits"}, "validation_images": 60},
    "model": {
        "channels": 8,
        "channel_multipliers": [1],
        "attention_resolutions": [],
        "head_channels": 8,
    },
    "train": {
        "images": 64,
        "global_batch": 16,
        "log_images": 16,
        "checkpoint_images": 64,
        "warmup_images": 0,
    },
    "launch": {"processes": 2, "threads": 1},
}
EMPTY_FLOWS = """
from prefect import flow
{flows}
"""
LIMIT = 300.0
"""Seconds after which a command is killed."""
Sample = tuple[float, float]
"""Elapsed and CPU seconds."""


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("earlier", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-prefect", action="store_true", help="measure the fm commands only")
    parser.add_argument("--json", type=Path, help="file for the measurements")
    options = parser.parse_args()
    checkouts = {"here": ROOT, "earlier": options.earlier.resolve()}
    with tempfile.TemporaryDirectory() as folder:
        measured = _commands(checkouts, Path(folder), options.rounds)
        if not options.without_prefect:
            measured |= _prefect(checkouts, Path(folder), options.rounds)
    print(_table(measured))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


def _commands(checkouts: Mapping[str, Path], folder: Path, rounds: int) -> dict[str, dict[str, list[Sample]]]:
    tasks: dict[str, Callable[[Path, Path], Sample]] = {
        "fm --help": lambda checkout, place: _timed(checkout, place, "-m", "fm_core", "--help"),
        "fm status": lambda checkout, place: _timed(
            checkout, place, "-m", "fm_core", "status", "--config", "run.yaml"
        ),
        "fm validate --quick": lambda checkout, place: _timed(
            checkout, place, "-m", "fm_core", "validate", "--quick", "--config", "run.yaml"
        ),
        "fm train, to its first step": _first_step,
    }
    places = {name: folder / name for name in checkouts}
    for name, checkout in checkouts.items():
        places[name].mkdir()
        tree = {**TRAINING, "run": {"name": "first"}}
        (places[name] / "run.yaml").write_text(yaml.safe_dump(tree))
        _timed(checkout, places[name], "-m", "fm_core", "shard", "--config", "run.yaml")
    return {
        task: _in_turns(rounds, {name: (checkouts[name], places[name]) for name in checkouts}, run)
        for task, run in tasks.items()
    }


def _in_turns(
    rounds: int, places: Mapping[str, tuple[Path, Path]], run: Callable[[Path, Path], Sample]
) -> dict[str, list[Sample]]:
    """Samples of each checkout after one that is not counted; the order alternates."""
    samples: dict[str, list[Sample]] = {name: [] for name in places}
    for number in range(-1, rounds):
        names = list(places) if number % 2 else list(places)[::-1]
        for name in names:
            sample = run(*places[name])
            if number >= 0:
                samples[name].append(sample)
    return samples


def _timed(checkout: Path, place: Path, *arguments: str, **variables: str) -> Sample:
    """Run Python with these arguments in `place`, with the packages of a checkout."""
    before, started = _children(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env=_environment(checkout, **variables),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    elapsed = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} in {checkout}: {done.stderr[-2000:]}")
    return elapsed, _children() - before


def _first_step(checkout: Path, place: Path) -> Sample:
    """Seconds from the start of `fm train` to the first line of its metrics; the CPU time is that of all."""
    run = place / "runs" / "first"
    shutil.rmtree(run, ignore_errors=True)
    before, started = _children(), time.perf_counter()
    command = [sys.executable, "-m", "fm_core", "train", "--config", "run.yaml"]
    errors = place / "errors.txt"
    with (
        errors.open("w") as log,
        subprocess.Popen(
            command, cwd=place, env=_environment(checkout), stdout=subprocess.DEVNULL, stderr=log
        ) as process,
    ):
        metrics = run / "train" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() not in (None, 0) or time.perf_counter() - started > LIMIT:
                (run / "STOP").touch()
                process.terminate()
                raise SystemExit(f"fm train in {checkout}: {errors.read_text()[-2000:]}")
            time.sleep(0.01)
        elapsed = time.perf_counter() - started
        process.wait()
    return elapsed, _children() - before


def _prefect(checkouts: Mapping[str, Path], folder: Path, rounds: int) -> dict[str, dict[str, list[Sample]]]:
    """Shares of `prefect deploy --all` (for each deployment) and of a flow run, above empty flows."""
    home = folder / "prefect"
    home.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}/api"
    variables = {"PREFECT_HOME": str(home), "PREFECT_API_URL": url, "DO_NOT_TRACK": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port],
        cwd=folder,
        env={**_environment(ROOT, **variables), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(f"{url}/health", server)
        return _shares(checkouts, folder, rounds, variables)
    finally:
        server.terminate()
        server.wait()


def _shares(
    checkouts: Mapping[str, Path], folder: Path, rounds: int, variables: Mapping[str, str]
) -> dict[str, dict[str, list[Sample]]]:
    places = {name: (checkouts[name], folder / name) for name in checkouts}
    pool = ("-m", "prefect", "work-pool", "create", "local", "--type", "process")
    _timed(ROOT, folder, *pool, **variables)
    counts = dict[str, int]()
    for name, (checkout, place) in places.items():
        counts[name] = len(yaml.safe_load((checkout / "infra" / "prefect.yaml").read_text())["deployments"])
        _write_empty_flows(place / "empty", counts[name])

    def deploy(checkout: Path, place: Path) -> Sample:
        count = counts[place.name]
        ours = _timed(checkout, checkout, *DEPLOY, "--prefect-file", "infra/prefect.yaml", **variables)
        empty = _timed(place / "empty", place / "empty", *DEPLOY, **variables)
        return (ours[0] - empty[0]) / count, (ours[1] - empty[1]) / count

    def flow_run(checkout: Path, place: Path) -> Sample:
        ours = _timed(checkout, place, "-c", SHARD.format(data=TRAINING["data"]), **variables)
        empty = _timed(place / "empty", place / "empty", "-c", EMPTY_RUN, **variables)
        return ours[0] - empty[0], ours[1] - empty[1]

    return {
        task: _in_turns(rounds, places, run)
        for task, run in zip(DIFFERENCES, (deploy, flow_run), strict=True)
    }


DIFFERENCES = (
    "prefect deploy --all, each deployment above an empty flow",
    "a flow run of shard-dataset above an empty flow",
)
"""Measurements from which those of empty flows are subtracted."""
DEPLOY = ("-m", "prefect", "--no-prompt", "deploy", "--all")
SHARD = """
from flows.stages import shard_dataset
shard_dataset(config={{"data": {data!r}, "run": {{"name": "of-a-flow"}}}})
"""
EMPTY_RUN = "import empty; empty.flow_0()"


def _write_empty_flows(folder: Path, count: int) -> None:
    folder.mkdir()
    flows = "\n".join(
        f'@flow(name="empty-{n}")\ndef flow_{n}() -> None:\n    """Nothing."""\n' for n in range(count)
    )
    (folder / "empty.py").write_text(EMPTY_FLOWS.format(flows=flows))
    deployments = [
        {"name": "default", "entrypoint": f"empty.flow_{n}", "work_pool": {"name": "local"}}
        for n in range(count)
    ]
    (folder / "prefect.yaml").write_text(yaml.safe_dump({"name": "empty", "deployments": deployments}))


def _environment(checkout: Path, **variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**inherited, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", **variables}


def _children() -> float:
    """CPU seconds of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{url} does not answer")


def _table(measured: Mapping[str, Mapping[str, list[Sample]]]) -> str:
    lines = [
        "| | elapsed, ratio to earlier | lowest, highest | CPU, ratio to earlier | here: elapsed, CPU (s) "
        "| earlier |",
        "|---|---|---|---|---|---|",
    ]
    for task, samples in measured.items():
        here, earlier = ([[each[part] for each in samples[name]] for part in (0, 1)] for name in samples)
        medians = [[statistics.median(values) for values in each] for each in (here, earlier)]
        if task in DIFFERENCES:
            # A single difference may be near zero, so that only medians are compared.
            ratios = [medians[0][part] / medians[1][part] if medians[1][part] > 0 else 0.0 for part in (0, 1)]
            spread = ""
        else:
            pairs = [ours / theirs for ours, theirs in zip(here[0], earlier[0], strict=True)]
            cpu = [ours / theirs for ours, theirs in zip(here[1], earlier[1], strict=True)]
            ratios = [statistics.median(pairs), statistics.median(cpu)]
            spread = f"{min(pairs):.2f}, {max(pairs):.2f}"
        shown = [f"{elapsed:.2f}, {cpu:.2f}" for elapsed, cpu in medians]
        lines.append(f"| {task} | {ratios[0]:.2f} | {spread} | {ratios[1]:.2f} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
