"""Jobs whose ranks are forked from one loaded process per test session (rank_server.py).

They start within milliseconds, where a launcher's ranks import torch and DeepSpeed first. What a launcher
does (signals, exit records, restarts) is not part of it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fm_core.config import dump_yaml, load_config
from fm_core.launch import local
from fm_core.launch.launcher import StageJob
from fm_core.launch.worker_main import Rank, load_worker
from fm_core.run.progress import Observer
from fm_core.storage.atomic_files import read_json, write_text
from tests.support import ROOT
from tests.support.forked_rank_group import PADDING, SPACE_BYTES

VARIABLES = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
}


@cache
def _server() -> subprocess.Popen[str]:
    """The server of this process; it ends when its standard input is closed."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.rank_server", "x" * SPACE_BYTES],
        env={**os.environ, **VARIABLES, **PADDING},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _answer(request: dict[str, Any]) -> str:
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


def run_ranks(call: str, ranks: int, log: Path, *arguments: Any) -> None:
    """Call `call`, "module:function", in each of `ranks` processes, which must all return."""
    answer = _answer({"call": call, "arguments": arguments, "ranks": ranks, "log": str(log)})
    text = log.read_text()[-8000:] if log.exists() else "no log"
    assert answer, f"the server of ranks has ended:\n{text}"
    assert not any(json.loads(answer)), f"exit statuses of the ranks {answer}:\n{text}"


def run_experiments(module: str, folder: Path, ranks: int, result: str) -> Any:
    """Run `main(FOLDER)` of a module of tests.support on `ranks` ranks; content of its JSON file `result`."""
    log = folder / f"{module}-{ranks}.log"
    run_ranks(f"tests.support.{module}:main", ranks, log, str(folder))
    content = read_json(folder / result)
    assert content, log.read_text()[-8000:]
    return content


@contextmanager
def forked_jobs() -> Iterator[None]:
    """Let the local launcher start its jobs as forks, with all else as it is (forked_rank_group.py)."""

    def spawn(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> SimpleNamespace:
        request = {"agent": command, "variables": {**os.environ, **variables}}
        answer = _answer({**request, "folder": str(Path.cwd()), "log": str(log)})
        return SimpleNamespace(pid=int(answer))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "spawn_detached", spawn)
        yield


def supervise(stage_job: StageJob, observe: Observer) -> None:
    """Run a stage's job in place of fm_core.launch.supervisor.supervise."""
    stage_job.control.mkdir(parents=True, exist_ok=True)
    config_file = stage_job.logs / f"{stage_job.stage}.yaml"
    write_text(config_file, dump_yaml(stage_job.config))
    processes = stage_job.config.launch.processes
    assert processes, "launch.processes is not set"
    log = stage_job.logs / f"{stage_job.stage}-forked.log"
    arguments = (stage_job.worker, str(config_file), str(stage_job.control))
    run_ranks("tests.support.forked_ranks:stage_rank", processes, log, *arguments)
    assert stage_job.complete(), log.read_text()[-8000:]


def stage_rank(worker: str, config_file: str, control: str) -> None:
    """Be one rank of a stage's job."""
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    load_worker(worker)(load_config(config_file), Rank(number, count, number, Path(control), "forked"))
