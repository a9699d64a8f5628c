"""`infra/demo.sh`, interrupted by Ctrl-C while it trains."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.demo_project import SMALL_NETWORK, clean_environment, copy_of_the_tree
from tests.support.operator import PATIENCE_SECONDS, until

LONG_RUN = {"model": SMALL_NETWORK, "train": {"images": 10_000_000, "log_images": 640, "warmup_images": 0}}


@dataclass
class InterruptedDemo:
    root: Path
    status: int
    printed: str


@pytest.fixture(scope="module")
def interrupted_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InterruptedDemo]:
    """A demo of a long run that got Ctrl-C when it had trained a little; it deploys only what it runs."""
    root = copy_of_the_tree(tmp_path_factory.mktemp("interrupted"))
    file = root / "infra" / "prefect.yaml"
    project = yaml.safe_load(file.read_text())
    (digits,) = [each for each in project["deployments"] if each["entrypoint"] == "flows.train.train_digits"]
    file.write_text(yaml.safe_dump(project | {"deployments": [digits]}))
    with (root / "output.txt").open("w") as output:
        demo = subprocess.Popen(
            ["bash", "infra/demo.sh", "--", json.dumps(LONG_RUN)],
            cwd=root,
            env=clean_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Whoever started the tests in the background had them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    metrics = root / "runs" / "digits" / "train" / "metrics.jsonl"
    try:
        until(lambda: metrics.exists() or demo.poll() is not None, "training begins")
        os.killpg(demo.pid, signal.SIGINT)  # what Ctrl-C does
        status = demo.wait(PATIENCE_SECONDS)
        yield InterruptedDemo(root, status, (root / "output.txt").read_text())
    finally:
        for process in processes_below(root):
            with suppress(psutil.Error):
                process.kill()


def processes_below(root: Path) -> list[psutil.Process]:
    matches: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            ours = str(root) in (process.environ().get("PYTHONPATH") or "")
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                matches.append(process)
        except psutil.Error:
            continue
    return matches


def test_an_interrupted_demo_leaves_checkpoints_and_no_process(interrupted_demo: InterruptedDemo):
    run, printed = interrupted_demo.root / "runs" / "digits" / "train", interrupted_demo.printed
    assert (run / "metrics.jsonl").exists(), printed
    assert interrupted_demo.status == 3, printed
    assert list((run / "checkpoints").glob("step-*/COMPLETE")), printed
    assert processes_below(interrupted_demo.root) == []
