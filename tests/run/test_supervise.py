import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import GaveUp, Stopped, UserError
from fm_core.run.directory import RunDirectory
from fm_core.run.files import read_json, read_lines, write_json
from fm_core.run.launch import JOB_VARIABLE, Job, alive, cancel, processes_of, submitted
from fm_core.run.lease import Lease
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.run.supervise import Duty, JobFailed, _pause, _verdict, supervise
from fm_core.stages.train import newest_step

HERE = Path(__file__).parent
LAUNCH = {"processes": 2, "restarts": 0, "restart_seconds": 0.2}


class Job2:
    """A directory in which two ranks pretend to work."""

    def __init__(self, path: Path, monkeypatch) -> None:
        self.control, self.logs, self.seen = path, path / "logs", []
        self.logs.mkdir()
        self.config = RunConfig.model_validate({"run": {"root": str(path)}, "launch": LAUNCH})
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        self.does = lambda text: monkeypatch.setenv("PRETEND", text)

    def launch(self, **keys):
        launch = self.config.launch.model_copy(update=keys)
        self.config = self.config.model_copy(update={"launch": launch})

    def run(self, complete=lambda: False, observe=None, **more):
        observe = observe or self.seen.append
        duty = Duty(self.control, self.logs, "pretend", "pretend_rank", self.config, complete, **more)
        return supervise(duty, observe)

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
        deadline = time.monotonic() + 90
        while not all(self.control.joinpath(f"ready-{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)

    def processes(self):
        """Every live process with this job's id in its environment, asked of /proc itself."""
        mark = f"{JOB_VARIABLE}={submitted(self.control).id}".encode()
        found = []
        for process in psutil.process_iter():
            try:
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
            except OSError:
                continue
        return found


@pytest.fixture
def job(tmp_path, monkeypatch):
    job = Job2(tmp_path, monkeypatch)
    yield job
    if submitted(job.control):
        for process in job.processes():
            process.kill()


@pytest.mark.slow
def test_ranks_that_end_well_without_finishing_are_a_failure(job):
    job.does("write;nothing")
    with pytest.raises(RuntimeError, match="not complete"):
        job.run(complete=lambda: (job.control / "made-1.json").exists())


@pytest.mark.slow
def test_a_job_whose_rank_is_killed_starts_again_and_each_restart_is_told(job):
    job.launch(restarts=3)
    job.does("killed-2;write")
    beside = []

    @contextmanager
    def meanwhile():
        beside.append(submitted(job.control).id)
        yield
        beside.append("closed")

    submissions = []
    job.run(
        complete=lambda: (job.control / "made-0.json").exists(),
        meanwhile=meanwhile,
        submitted=lambda: submissions.append(submitted(job.control).id),
    )
    assert beside[1:] == ["closed"]
    assert len(set(submissions)) == 3
    assert beside[0] != submitted(job.control).id
    records = read_lines(job.logs / "restarts.jsonl")
    assert [(record["restart"], record["of"], record["pause_seconds"]) for record in records] == [
        (1, 3, 0.2),
        (2, 3, 0.4),
    ]
    host = socket.gethostname()
    assert all(f"rank 0 on {host} was killed" in record["because"] for record in records)
    told = [progress.message for progress in job.seen]
    assert any(message.startswith("restart 2 of 3 in 0.4 s: pretend failed") for message in told)
    assert len(list(job.control.glob("here-0-*"))) == 3


@pytest.mark.slow
def test_a_store_that_is_away_is_waited_for(job):
    job.launch(restarts=2)
    job.does("unreachable-1;write")
    job.run(complete=lambda: (job.control / "made-0.json").exists())
    (record,) = read_lines(job.logs / "restarts.jsonl")
    assert "rank 0: s3://bucket: tried 5 times" in record["because"]


@pytest.mark.slow
def test_restarts_come_to_an_end_and_one_that_gave_up_has_none(job):
    job.launch(restarts=1)
    job.does("killed-9;write")
    with pytest.raises(JobFailed, match="rank 0 on"):
        job.run()
    assert len(list(job.control.glob("here-0-*"))) == 2
    job.does("give up;wait")
    with pytest.raises(GaveUp, match=r"^nothing helps$"):
        job.run()
    assert len(list(job.control.glob("here-0-*"))) == 3
    assert job.processes() == []


def starts_until_given_up(tmp_path, monkeypatch, lasting):
    """Jobs that fail, one after another; what had lasted after each is given."""
    starts = []
    launch = {"restarts": 2, "restart_seconds": 0.0}
    config = RunConfig.model_validate({"run": {"root": str(tmp_path)}, "launch": launch})

    def fail(*_):
        starts.append(True)
        raise JobFailed("a rank was killed")

    monkeypatch.setattr("fm_core.run.supervise._attach_or_submit", lambda duty: "a job")
    monkeypatch.setattr("fm_core.run.supervise._watch", fail)
    duty = Duty(
        *(tmp_path, tmp_path, "pretend", "none", config, lambda: False),
        lasting=lambda: lasting[min(len(starts), len(lasting)) - 1],
    )
    with pytest.raises(JobFailed):
        supervise(duty, lambda progress: None)
    return len(starts), [record["restart"] for record in read_lines(tmp_path / "restarts.jsonl")]


@pytest.mark.parametrize(
    ("lasting", "starts", "restarts"),
    [
        ([0], 3, [1, 2]),
        ([50], 3, [1, 2]),  # of an earlier life
        ([0, 0, 100, 100, 200], 7, [1, 2, 1, 2, 1, 2]),
        ([100, 90, 200, 100, 90], 5, [1, 2, 1, 2]),  # only more than ever before counts
    ],
)
def test_what_was_finished_for_good_begins_the_count_anew(tmp_path, monkeypatch, lasting, starts, restarts):
    assert starts_until_given_up(tmp_path, monkeypatch, lasting) == (starts, restarts)


def test_what_lasts_of_training_is_its_newest_checkpoint(tmp_path):
    run = RunDirectory(RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "a"}}))
    assert newest_step(run) == 0
    write_status(run.path, Progress("train", 1, 9, "images"), last_checkpoint="step-00000120")
    assert newest_step(run) == 120


def test_a_stop_file_ends_the_pause_before_a_restart(tmp_path):
    (tmp_path / "STOP").touch()
    with pytest.raises(Stopped):
        _pause(100, tmp_path)
    with pytest.raises(Stopped):
        _pause(0, tmp_path / "control", tmp_path)
    _pause(0, tmp_path / "control")


@pytest.mark.slow
def test_what_ended_each_rank_reaches_the_caller(job):
    job.launch(processes=3)
    job.does("refuse;raise;killed")
    with pytest.raises(UserError, match=r"^sample.steps: this cannot be$"):
        job.run()
    handle = submitted(job.control)
    assert job.processes() == []
    # Without the refusal it would have been a failure, told in one line.
    job.control.joinpath("pretend-0.end.json").unlink()
    verdict = str(_verdict(handle, job.control))
    assert f"rank 2 on {socket.gethostname()} was killed" in verdict
    assert "rank 1: ZeroDivisionError: a number" in verdict
    assert "\n" not in verdict
    assert handle.log in verdict
    log = (job.logs / "pretend-1.log").read_text()
    assert "rank 1 does raise" in log
    assert "Traceback" in log


@pytest.mark.slow
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
        assert isinstance(outcome[0], Stopped), outcome
        assert str(outcome[0]) == "stopped at thing 3"
    assert job.processes() == []


# `fm train` itself, but for what it starts.
COMMAND = """
import sys
from pathlib import Path
from types import SimpleNamespace
from fm_core import cli
from fm_core.run.supervise import Duty, supervise

def pretend(config, observe):
    control = Path(config.run.root)
    supervise(Duty(control, control / "logs", "pretend", "pretend_rank", config, lambda: False), observe)

sys.modules["fm_core.stages.train"] = SimpleNamespace(train=pretend)
sys.exit(cli.main(["train", "--config", sys.argv[1]]))
"""


@pytest.mark.slow
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
        began = time.monotonic()
        {"the command": command, "the agent": agent, "the second rank": second}[whom].terminate()
        said = command.communicate(timeout=60)[1]
        took = time.monotonic() - began
    finally:
        command.kill()
    assert command.returncode == 3, said
    assert took < 25, f"{took:.1f} s"
    assert "Traceback" not in said
    assert job.processes() == []
    for rank in (0, 1):
        assert read_json(job.control / f"pretend-{rank}.end.json")["kind"] == "stopped"


@pytest.mark.slow
def test_an_interrupted_supervisor_leaves_no_process_not_even_a_deaf_one(job, monkeypatch):
    monkeypatch.setattr("fm_core.run.supervise.cancel", partial(cancel, grace=2.0))
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


@pytest.mark.slow
def test_a_killed_supervisor_leaves_the_job_and_the_next_one_attaches(job):
    job.does("wait;wait")
    script = (
        "import sys; from pathlib import Path; from fm_core.config import RunConfig;"
        "from fm_core.run.supervise import Duty, supervise; p = Path(sys.argv[1]);"
        "supervise(Duty(p, p / 'logs', 'pretend', 'pretend_rank', RunConfig.model_validate("
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
    # And kill -9 of the agent: the ranks hear of it, save and end; nobody asked for that, and nothing stays.
    os.kill(handle.pid, signal.SIGKILL)
    thread.join(60)
    assert isinstance(outcome[0], JobFailed)
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


@pytest.mark.slow
@pytest.mark.parametrize("record", ["absent", "of another job", "of another agent"])
def test_a_rank_that_nobody_knows_of_does_not_work(tmp_path, monkeypatch, record):
    """Its supervisor was killed before job.json was written: a second start would double it."""
    facts = {"id": "a1", "stage": "pretend", "host": "h", "pid": os.getpid(), "created": 0.0}
    facts |= {"processes": 1, "threads": 1, "log": "x"}
    if record == "of another job":
        write_json(tmp_path / "job.json", {**facts, "id": "b2"})
    if record == "of another agent":
        write_json(tmp_path / "job.json", {**facts, "pid": os.getpid() + 1})
    script = (
        "import fm_core.run.rank as r, sys; r.ADOPTION_SECONDS = 0.5; sys.argv = ['x', 'none.yaml'];"
        "r.run_rank('pretend', lambda config, rank: open('worked', 'w'))"
    )
    variables = {"FM_CONTROL": str(tmp_path), "FM_LOGS": str(tmp_path), "FM_JOB": "a1"}
    variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **variables, "PYTHONPATH": str(HERE.parents[1])},
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 1
    assert not (tmp_path / "worked").exists()
    assert list(tmp_path.glob("*.end.json")) == []
    assert "rank 0 ends" in (tmp_path / "pretend-0.log").read_text()


def test_a_directory_held_by_another_host_is_refused_in_one_line(tmp_path):
    lease = Lease(tmp_path / "lock")
    lease.take(os.getpid(), stage="train")
    record = read_json(lease.path)
    record.pop("schema")
    write_json(lease.path, {**record, "host": "elsewhere"})
    opened = []

    @contextmanager
    def beside():
        opened.append(True)
        yield

    duty = Duty(
        *(tmp_path, tmp_path, "pretend", "none", RunConfig(), lambda: True, beside),
        submitted=lambda: opened.append(True),
    )
    with pytest.raises(UserError) as caught:
        supervise(duty, print)
    assert not opened, "nothing begins, or is ended, beside a job that is not ours"
    assert "elsewhere" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_processes_of_a_job_are_found_by_its_mark(tmp_path):
    facts = {"id": "a-mark-of-this-test", "stage": "s", "host": "h", "pid": 1, "created": 0.0}
    job = Job.model_validate({**facts, "processes": 1, "threads": 1, "log": "x"})
    assert processes_of(job) == []
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, JOB_VARIABLE: job.id}
    )
    time.sleep(0.3)
    assert [process.pid for process in processes_of(job)] == [child.pid]
    child.kill()
    assert processes_of(job) == []
    child.wait()
