"""Fake rank of a job, with few imports.

FAKE_RANKS says what each rank does, e.g. "write;raise": rank 0 writes its file, rank 1 raises.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fm_core.errors import StopRequested, UnreachableError, UnrecoverableError, UserError
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import write_json


def work(config, rank):
    does = os.environ["FAKE_RANKS"].split(";")[rank.number]
    folder = rank.control
    print(f"rank {rank.number} does {does}", flush=True)
    folder.joinpath(f"here-{rank.number}-{rank.job}").touch()
    while len(list(folder.glob(f"here-*-{rank.job}"))) < rank.count:
        time.sleep(0.01)
    if "-" in does:  # at the first N starts; later ones succeed
        does, _, starts = does.partition("-")
        does = does if len(list(folder.glob(f"here-{rank.number}-*"))) <= int(starts) else "write"
    if does == "write":
        write_json(folder / f"made-{rank.number}.json", {"job": rank.job, "run": config.run.name})
    elif does == "raise":
        raise ZeroDivisionError("a number\nof two lines")
    elif does == "no recovery":
        raise UnrecoverableError("nothing helps")
    elif does == "unreachable":
        raise UnreachableError("s3://bucket: tried 5 times")
    elif does == "refuse":
        raise UserError("sample.steps: this cannot be")
    elif does == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif does == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        Path(folder / f"ready-{rank.number}").touch()
        time.sleep(300)
    elif does == "wait":
        write_status(folder, Progress("pretend", 3, 7, "things", "waiting"), job=rank.job)
        Path(folder / f"ready-{rank.number}").touch()
        for _ in range(3000):
            if rank.stop_requested():
                raise StopRequested("stopped at thing 3")
            time.sleep(0.1)
    elif does != "nothing":
        raise ValueError(does)
