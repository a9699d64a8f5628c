"""Job of two fake ranks under a supervisor of this process."""

import threading
import time
from pathlib import Path

import psutil

from fm_core.config import RunConfig
from fm_core.launch.dispatch import JOB_VARIABLE, submitted
from fm_core.launch.supervisor import StageJob, supervise
from tests.support import ROOT

FAKE_RANK = "tests.support.fake_rank:work"
LAUNCH = {"processes": 2, "restarts": 0, "restart_seconds": 0.2}


class FakeJob:
    """A control directory and the job that runs in it."""

    def __init__(self, path: Path, monkeypatch) -> None:
        self.control, self.logs, self.seen = path, path / "logs", []
        self.logs.mkdir()
        self.config = RunConfig.model_validate({"run": {"root": str(path)}, "launch": LAUNCH})
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        self.does = lambda text: monkeypatch.setenv("FAKE_RANKS", text)

    def launch(self, **keys):
        launch = self.config.launch.model_copy(update=keys)
        self.config = self.config.model_copy(update={"launch": launch})

    def run(self, complete=lambda: False, observe=None, **more):
        observe = observe or self.seen.append
        stage_job = StageJob(self.control, self.logs, "pretend", FAKE_RANK, self.config, complete, **more)
        return supervise(stage_job, observe)

    def in_thread(self, **arguments):
        outcome = []

        def body():
            try:
                outcome.append(self.run(**arguments))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        return thread, outcome

    def wait_ready(self, *ranks):
        self.wait_for(lambda: all(self.control.joinpath(f"ready-{rank}").exists() for rank in ranks))

    def wait_for(self, happened):
        deadline = time.monotonic() + 300
        while not happened():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.05)

    def processes(self):
        """Every live process with this job's id in its environment, from /proc itself."""
        mark = f"{JOB_VARIABLE}={submitted(self.control).id}".encode()
        matches = []
        for process in psutil.process_iter():
            try:
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                    matches.append(process)
            except OSError:
                continue
        return matches
