"""Job ownership: which processes end a job or attach to it, and that none of its processes is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from fm_core.config import dump_yaml
from fm_core.errors import JobFailedError, StopRequested
from fm_core.launch.dispatch import JOB_VARIABLE, Job, alive, cancel, processes_of, submitted
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import read_json, write_json

ROOT = Path(__file__).parents[2]


def test_a_second_supervisor_attaches_and_the_stop_file_ends_both(job):
    job.does("wait;wait")
    first, first_outcome = job.in_thread()
    job.wait_ready(0, 1)
    handle = submitted(job.control)
    seen = []
    second, second_outcome = job.in_thread(observe=seen.append)
    deadline = time.monotonic() + 30
    while not (seen and job.seen):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert submitted(job.control) == handle
    assert len(job.processes()) == 3  # the agent and two ranks
    assert (seen[0].done, seen[0].total, seen[0].message) == (3, 7, "waiting")
    assert Lease(job.control / "lock").holder()["job"] == handle.id
    (job.control / "STOP").touch()
    for thread, outcome in ((first, first_outcome), (second, second_outcome)):
        thread.join(60)
        assert isinstance(outcome[0], StopRequested), outcome
        assert str(outcome[0]) == "stopped at thing 3"
    assert job.processes() == []


# `fm train` with a fake stage.
COMMAND = """
import sys
from pathlib import Path
from uuid import uuid4
from types import SimpleNamespace
from fm_core import cli
from fm_core.launch.supervisor import StageJob, supervise
from tests.support.fake_job import FAKE_RANK

def pretend(config, observe):
    control = Path(config.run.root)
    job = StageJob(control, control / "logs", "pretend", FAKE_RANK, config, lambda: False)
    supervise(job, observe)

sys.modules["fm_core.stages.train"] = SimpleNamespace(train=pretend)
sys.exit(cli.main(["train", "--config", sys.argv[1]]))
"""


@pytest.mark.parametrize("whom", ["the command", "the agent", "the second rank"])
def test_a_signal_to_any_process_of_the_tree_ends_all_with_status_3(job, whom):
    job.does("wait;wait")
    file = job.control / "asked.yaml"
    file.write_text(dump_yaml(job.config))
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(file)], stderr=subprocess.PIPE, text=True)
    try:
        job.wait_ready(0, 1)
        agent = psutil.Process(submitted(job.control).pid)
        (second,) = (child for child in agent.children() if child.environ().get("RANK") == "1")
        {"the command": command, "the agent": agent, "the second rank": second}[whom].terminate()
        stderr = command.communicate(timeout=60)[1]
    finally:
        command.kill()
    assert command.returncode == 3, stderr
    assert "Traceback" not in stderr
    assert job.processes() == []
    for rank in (0, 1):
        assert read_json(job.control / f"pretend-{rank}.end.json")["kind"] == "stopped"


def test_an_interrupted_supervisor_leaves_no_process_even_one_that_ignores_signals(job, monkeypatch):
    monkeypatch.setattr("fm_core.launch.supervisor.cancel", partial(cancel, grace=2.0))
    job.does("wait;deaf")
    alive_before = []

    def interrupt(progress):
        if all(job.control.joinpath(f"ready-{rank}").exists() for rank in (0, 1)):
            alive_before.extend(job.processes())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(observe=interrupt)
    assert len(alive_before) == 4  # the agent, two ranks, a child of the deaf one
    assert job.processes() == []
    assert read_json(job.control / "pretend-0.end.json")["kind"] == "stopped"
    assert not (job.control / "pretend-1.end.json").exists()


def test_a_killed_supervisor_leaves_the_job_and_the_next_one_attaches(job):
    job.does("wait;wait")
    script = (
        "import sys; from pathlib import Path; from fm_core.config import RunConfig;"
        "from fm_core.launch.supervisor import StageJob, supervise; p = Path(sys.argv[1]);"
        "supervise(StageJob(p, p / 'logs', 'pretend', 'tests.support.fake_rank:work',"
        "RunConfig.model_validate("
        "{'launch': {'processes': 2}}), lambda: False), print)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script, str(job.control)])
    job.wait_ready(0, 1)
    supervisor.kill()
    supervisor.wait()
    handle = submitted(job.control)
    assert alive(handle)
    thread, outcome = job.in_thread()
    while not job.seen:
        time.sleep(0.05)
        assert thread.is_alive(), outcome
    assert submitted(job.control).id == handle.id
    # After kill -9 of the agent the ranks save and exit; that is a failure, and no process is left.
    os.kill(handle.pid, signal.SIGKILL)
    thread.join(60)
    assert isinstance(outcome[0], JobFailedError)
    assert f"the launcher on {socket.gethostname()} was killed" in str(outcome[0])
    assert job.processes() == []
    # The next start works, in the same place.
    job.does("write;write")
    made = [job.control / f"made-{rank}.json" for rank in (0, 1)]
    job.run(complete=lambda: all(path.exists() for path in made))
    again = submitted(job.control)
    assert again.id != handle.id
    assert {read_json(path)["job"] for path in made} == {again.id}
    assert not alive(again)
    assert Lease(job.control / "lock").holder() is None
    assert job.processes() == []


@pytest.mark.parametrize("record", ["absent", "of another job", "of another agent"])
def test_a_rank_without_a_matching_job_record_does_not_work(tmp_path, monkeypatch, record):
    """Its supervisor was killed before job.json was written: a second start would double it."""
    mark = uuid4().hex  # tests beside this one end the processes of their jobs by their marks
    facts = {"id": mark, "stage": "pretend", "host": "h", "pid": os.getpid(), "created": 0.0}
    facts |= {"processes": 1, "threads": 1, "log": "x"}
    if record == "of another job":
        write_json(tmp_path / "job.json", {**facts, "id": "b2"})
    if record == "of another agent":
        write_json(tmp_path / "job.json", {**facts, "pid": os.getpid() + 1})
    script = (
        "import fm_core.launch.worker_main as r, sys; r.ADOPTION_SECONDS = 0.5;"
        "r.run_worker('pretend', lambda config, rank: open('worked', 'w'), 'none.yaml')"
    )
    variables = {"FM_CONTROL": str(tmp_path), "FM_LOGS": str(tmp_path), "FM_JOB": mark}
    variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 1
    assert not (tmp_path / "worked").exists()
    assert list(tmp_path.glob("*.end.json")) == []
    assert "rank 0 exits" in (tmp_path / "pretend-0.log").read_text()


def test_processes_of_a_job_are_identified_by_its_mark(tmp_path):
    facts = {"id": uuid4().hex, "stage": "s", "host": "h", "pid": 1, "created": 0.0}
    job = Job.model_validate({**facts, "processes": 1, "threads": 1, "log": "x"})
    assert processes_of(job) == []
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, JOB_VARIABLE: job.id}
    )
    assert [process.pid for process in processes_of(job)] == [child.pid]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead and not yet reaped
    assert processes_of(job) == []
    child.wait()
