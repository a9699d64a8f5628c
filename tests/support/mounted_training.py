"""Training while its disks come and go: `unshare -m python -m tests.support.mounted_training FOLDER`.

The process has a mount namespace of its own, in which it binds and unmounts the checkpoints' disk and fills a
small one. It trains in this process (launch.kind debug) and writes what happened to results.json.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import complete_steps
from fm_core.config import RunConfig
from fm_core.errors import FlowMatchingError, StopRequested, UserError
from fm_core.method.objectives import FlowMatching
from fm_core.run.status import read_status
from fm_core.stages.sample import sample
from fm_core.stages.shard import shard
from fm_core.stages.train import train
from fm_core.storage.atomic_files import read_lines, write_json
from tests.support.fault_injection import finish_saving
from tests.support.tiny_run import TinyRun

DEBUG = {"launch": {"kind": "debug", "processes": 1, "threads": 1}}
LOSS = FlowMatching.loss


class Faults:
    """Does something before the n-th step of a process."""

    def __init__(self):
        self.steps, self.actions = 0, {}

    def loss(self, objective, network, sample, label=None):
        if getattr(network, "module", network).training:  # not for the validation loss
            self.steps += 1
            if action := self.actions.pop(self.steps, None):
                finish_saving()
                action()
        return LOSS(objective, network, sample, label)


def at_steps(actions):
    faults = Faults()
    faults.actions = actions
    FlowMatching.loss = lambda self, *arguments: faults.loss(self, *arguments)


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)


def unmount(place):
    subprocess.run(["umount", str(place)], check=True)


def attempt(config: RunConfig) -> dict:
    """Train; how it ended, and what is there then."""
    try:
        outcome, message = "done", train(config).state
    except FlowMatchingError as error:
        outcome, message = type(error).__name__, str(error)
    at_steps({})
    run = Path(config.run.root) / config.run.name
    return {
        "outcome": outcome,
        "message": message,
        "steps": complete_steps(CheckpointCatalog.of(config).folder),
        "lines": [line["step"] for line in read_lines(run / "train" / "metrics.jsonl")],
        "losses": [line["loss"] for line in read_lines(run / "train" / "metrics.jsonl")],
        "validation": [line["step"] for line in read_lines(run / "train" / "held_out.jsonl")],
        "status": read_status(run),
    }


def tiny(folder: Path, name: str, **keys) -> RunConfig:
    """The configuration of this run. A second call changes the keys of the same run."""
    keys = {"schedule": "constant", "images": 160, "log_images": 16, **keys}
    (folder / f"{name}.yaml").unlink(missing_ok=True)
    return TinyRun(folder, name, {**DEBUG, "train": keys}).config


def unmounted(folder: Path) -> dict:
    """The disk is unmounted when training is to continue, and again while it trains."""
    disk, place = folder / "disk", folder / "mounted"
    disk.mkdir()
    place.mkdir()
    mount("--bind", disk, place)
    story = {"first": attempt(tiny(folder, "away", checkpoint_root=str(place)))}
    unmount(place)
    longer = tiny(folder, "away", checkpoint_root=str(place), images=320)
    story["away"] = attempt(longer)
    story["left"] = [path.name for path in place.iterdir()]
    mount("--bind", disk, place)
    # From step 10 on: away before step 12 is saved, back before step 16 is.
    at_steps({2: lambda: unmount(place), 6: lambda: mount("--bind", disk, place)})
    story["blinked"] = attempt(longer)
    unmount(place)
    story["below"] = [path.name for path in place.iterdir()]
    return story


def full(folder: Path) -> dict:
    """The checkpoints' disk is full for some steps, and then the run directory's."""
    story = {}
    for name, where in (("full", "checkpoints"), ("full-run", "runs/full-run")):
        place = folder / where
        place.mkdir(parents=True)
        mount("-t", "tmpfs", "-o", "size=300M", "tmpfs", place)
        filler = place / "filler"

        def fill_up(filler=filler):
            with filler.open("wb", buffering=0) as file:
                for size in (2**20, 1):
                    with suppress(OSError):
                        while file.write(bytes(size)):
                            pass

        root = {"checkpoint_root": str(place)} if where == "checkpoints" else {}
        at_steps({2: fill_up, 6: filler.unlink})
        story[name] = attempt(tiny(folder, name, **root))
    return story


def begun_again(folder: Path) -> dict:
    """Checkpoints that are gone, under this version and an earlier one; train.start_over; none completed."""
    config = tiny(folder, "history")
    train_folder = Path(config.run.root) / "history" / "train"
    checkpoints, history = train_folder / "checkpoints", train_folder / "history.json"
    # Ended before its first checkpoint; step 1 and 2 are in its metrics.
    at_steps({3: die})
    story = {"died": attempt(config)}
    story["first"] = attempt(config)
    story["set aside"] = [line["step"] for line in read_lines(train_folder / "metrics.set-aside.jsonl")]
    checkpoints.rename(folder / "gone")
    longer = tiny(folder, "history", images=320)
    story["gone"] = attempt(longer)
    history.rename(folder / "history.json")
    (train_folder / "DONE.json").rename(folder / "DONE.json")
    status = read_status(train_folder.parent)
    write_json(
        train_folder.parent / "status.json", {**status, "schema": 1, "last_checkpoint": "step-00000010"}
    )
    story["gone, of an earlier version"] = attempt(longer)
    (folder / "history.json").rename(history)
    (folder / "gone").rename(checkpoints)
    (folder / "DONE.json").rename(train_folder / "DONE.json")
    over = tiny(folder, "history", start_over=True)
    at_steps({6: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    story["over"] = attempt(over)
    story["on"] = attempt(over)
    story["again"] = attempt(over)
    story["names"] = sorted(path.name for path in train_folder.iterdir())
    story["checkpoints"] = sorted(path.name for path in checkpoints.iterdir())
    return story


def die():
    raise StopRequested("the test wants an end without a checkpoint")


def two_runs(folder: Path) -> dict:
    """Two runs with one place for their checkpoints, and a sample of the wrong one."""
    root = str(folder / "one-place")
    story = {name: attempt(tiny(folder, name, checkpoint_root=root)) for name in ("a", "b")}
    config = tiny(folder, "b", checkpoint_root=root)
    try:
        sample(config)
    except UserError as error:
        story["sampled"] = str(error)
    return story


def main() -> None:
    folder = Path(sys.argv[1])
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    shard(tiny(folder, "reference"))
    results = {"reference": attempt(tiny(folder, "reference", images=320))}
    results |= {"unmounted": unmounted(folder), **full(folder)}
    results |= {"history": begun_again(folder), "two runs": two_runs(folder)}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
