"""Which job a start attaches to, is refused for, or replaces; and the end of a job that was replaced."""

import errno
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from fm_core import cli
from fm_core.config import RunConfig
from fm_core.errors import JobFailedError, LeaseLostError, Outcome, UserError
from fm_core.launch import job_ownership
from fm_core.launch.dispatch import Job, alive, cancel, collect, submitted
from fm_core.launch.exit_records import read_exit_records, write_exit_record
from fm_core.launch.job import successor
from fm_core.launch.launcher import with_agent
from fm_core.launch.node_agent import _begin_attempt
from fm_core.launch.node_spec import NodeSpec
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.run import lease as lease_module
from fm_core.run.fence import LeaseFence
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import read_json, write_json

FACTS = {"stage": "pretend", "host": "h", "processes": 1, "threads": 1, "log": "x"}
ELSEWHERE = {"host": "elsewhere", "host_id": "another boot/4026531836"}
RAN = []


def remember(config, rank):
    RAN.append(rank.fence)
    rank.fence.check()


def be_replaced(config, rank):
    """Another host takes over while the rank works."""
    take_elsewhere(rank.control, epoch=rank.fence.epoch + 1, job="b2")
    write_json(rank.control / "job.json", {**FACTS, "id": "b2"})
    with pytest.raises(LeaseLostError):
        rank.fence.check()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rank.stop_requested()
        time.sleep(0.02)


def take_elsewhere(control, **facts):
    lease = Lease(control / "lock")
    with lease.guard():
        lease.take(os.getpid(), stage="train", **facts)
        record = read_json(lease.path)
        record.pop("schema")
        write_json(lease.path, {**record, **ELSEWHERE})


def stage_job(control, worker, kind="debug", **more):
    control.mkdir(exist_ok=True)
    (control / "logs").mkdir(exist_ok=True)
    config = RunConfig.model_validate({"launch": {"kind": kind, "restarts": 0}})
    entry_point = f"tests.launch.test_lease_of_a_job:{worker.__name__}"
    return StageJob(control, control / "logs", "pretend", entry_point, config, lambda: bool(RAN), **more)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(job_ownership, "LOOK_INTERVAL_SECONDS", 0.02)
    RAN.clear()


def test_a_job_gets_its_epoch_and_checks_its_lease(tmp_path, fast):
    for expected in (1, 2):
        RAN.clear()
        supervise(stage_job(tmp_path, remember), print)
        assert (RAN[0].job, RAN[0].epoch) == (submitted(tmp_path).id, expected)
    (tmp_path / "lock").unlink(missing_ok=True)
    (tmp_path / ".lock.guard").unlink()
    RAN.clear()
    supervise(stage_job(tmp_path, remember), print)
    assert RAN[0].epoch == 3  # after that of job.json


def test_a_directory_is_refused_in_one_line_while_another_host_sends_heartbeats(tmp_path, fast):
    take_elsewhere(tmp_path, job="b2")
    opened, messages = [], []

    @contextmanager
    def meanwhile():
        opened.append(True)
        yield

    def observe(progress):
        messages.append(progress.message)
        Lease(tmp_path / "lock").heartbeat(job="b2")

    more = {"meanwhile": meanwhile, "before_submit": lambda: opened.append(True)}
    with pytest.raises(UserError, match=r"is in use by process \d+ on elsewhere \(train\)") as caught:
        supervise(stage_job(tmp_path, remember, **more), observe)
    assert not opened, "nothing is started or ended while another host's job runs"
    assert not RAN
    assert "\n" not in str(caught.value)
    assert len(messages) == 1
    assert "on elsewhere: waiting up to 0.15 s to see whether it still sends a heartbeat" in messages[0]


def test_a_directory_is_taken_over_from_a_host_that_sends_no_heartbeat(tmp_path, fast):
    take_elsewhere(tmp_path, job="b2")
    messages = []
    supervise(stage_job(tmp_path, remember), lambda progress: messages.append(progress.message))
    assert RAN[0].epoch == 2
    assert sum("waiting up to" in message for message in messages) == 1


def test_a_job_that_was_replaced_ends_without_touching_the_directory(tmp_path, fast):
    with pytest.raises(LeaseLostError, match=r"was taken over by process \d+ on elsewhere") as caught:
        supervise(stage_job(tmp_path, be_replaced), print)
    assert "\n" not in str(caught.value)
    assert Lease(tmp_path / "lock").record()["job"] == "b2"
    assert submitted(tmp_path).id == "b2"
    assert {path.name for path in tmp_path.iterdir()} == {"lock", ".lock.guard", "job.json", "logs"}


def test_a_start_that_is_refused_by_its_launcher_releases_the_lease(tmp_path, fast, monkeypatch):
    def refuse(*arguments):
        assert Lease(tmp_path / "lock").record()["pid"] == os.getpid()
        raise UserError("launch.hostfile: no host answers")

    monkeypatch.setattr(job_ownership, "submit", refuse)
    with pytest.raises(UserError, match="no host answers"):
        supervise(stage_job(tmp_path, remember), print)
    assert not (tmp_path / "lock").exists()
    assert submitted(tmp_path) is None


@pytest.mark.parametrize("there", ["nothing", "an earlier job"])
def test_a_restart_does_not_begin_where_the_last_job_is_not_known(tmp_path, fast, there):
    """The disk of the run directory is unmounted, or another one is mounted there."""
    last = Job.model_validate({**FACTS, "id": "b2", "epoch": 2})
    beginning = stage_job(tmp_path / "runs", remember)
    (tmp_path / "runs" / "logs").rmdir()
    if there == "an earlier job":
        write_json(tmp_path / "runs" / "job.json", {**FACTS, "id": "a1", "epoch": 1})
    before = list((tmp_path / "runs").iterdir())
    with pytest.raises(OSError, match="check that the directory is mounted") as caught:
        job_ownership.attach_or_submit(beginning, print, last)
    assert caught.value.errno == errno.ESTALE
    assert list((tmp_path / "runs").iterdir()) == before


def test_a_job_that_was_replaced_by_one_that_died_here_is_restarted(tmp_path, agent):
    job = Job.model_validate({**FACTS, "id": "a1", "kind": "debug"})
    lease = Lease(tmp_path / "lock")
    with lease.guard():
        lease.take(agent.pid, job="b2")
    agent.kill()
    agent.wait()
    with pytest.raises(JobFailedError, match="lost"), job_ownership.keep_lease(job, tmp_path):
        raise LeaseLostError("lost")
    take_elsewhere(tmp_path, job="b2")
    with pytest.raises(LeaseLostError, match="on elsewhere"), job_ownership.keep_lease(job, tmp_path):
        raise LeaseLostError("lost")


@pytest.fixture
def agent():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_job_is_attached_to_if_host_and_pid_and_start_match(agent):
    job = with_agent(Job.model_validate({**FACTS, "id": "a1"}), agent.pid)
    assert alive(job)
    for other in (
        {"host_id": "another boot/4026531836"},
        {"pid": os.getpid()},
        {"start_ticks": job.start_ticks - 1},
    ):
        assert not alive(job.model_copy(update=other))


def test_an_attached_job_needs_no_unmoved_clock(agent):
    job = with_agent(Job.model_validate({**FACTS, "id": "a1"}), agent.pid)
    assert alive(job.model_copy(update={"created": job.created - 3600, "host": "renamed"}))


def test_the_record_of_an_earlier_version_names_its_agent_by_host_name_and_second(agent):
    new = with_agent(Job.model_validate({**FACTS, "id": "a1"}), agent.pid)
    old = new.model_copy(update={"host_id": None, "start_ticks": None})
    assert alive(old)
    assert not alive(old.model_copy(update={"host": "elsewhere"}))
    assert not alive(old.model_copy(update={"created": old.created - 60}))


@pytest.mark.parametrize("by", ["its lease", "its record"])
def test_a_replaced_job_is_neither_stopped_nor_collected_in_the_directory_of_its_successor(tmp_path, by):
    job = Job.model_validate({**FACTS, "id": "a1", "kind": "debug"})
    write_json(tmp_path / "job.json", job.model_dump())
    assert successor(job, tmp_path) is None
    if by == "its lease":
        take_elsewhere(tmp_path, job="b2")
    else:
        write_json(tmp_path / "job.json", {**FACTS, "id": "b2"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert successor(job, tmp_path)["host"] in ("elsewhere", "h")
    cancel(job, tmp_path)
    assert collect(job, tmp_path) == []
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_rank_of_a_replaced_job_leaves_no_exit_record(tmp_path):
    write_json(tmp_path / "job.json", {**FACTS, "id": "b2"})
    write_exit_record(tmp_path, "pretend", "a1", 0, Outcome.FAILED, "gloo: connection closed")
    assert list(tmp_path.glob("*.end.json")) == []
    write_exit_record(tmp_path, "pretend", "b2", 0, Outcome.DONE, "")
    assert list(read_exit_records(tmp_path, submitted(tmp_path))) == [0]


def test_a_rank_of_an_earlier_attempt_leaves_no_exit_record(tmp_path):
    """Slurm queues a job again, with its id, whose ranks may still run on a node that was cut off."""
    write_json(tmp_path / "job.json", {**FACTS, "id": "a1", "epoch": 2})
    write_exit_record(tmp_path, "pretend", "a1", 0, Outcome.FAILED, "gloo: connection closed", epoch=1)
    assert list(tmp_path.glob("*.end.json")) == []
    write_exit_record(tmp_path, "pretend", "a1", 0, Outcome.DONE, "", epoch=2)
    assert list(read_exit_records(tmp_path, submitted(tmp_path))) == [0]


def node_spec(control, job):
    places = {"control": str(control), "logs": "l", "folder": "f", "port": 1}
    return NodeSpec(job=job, worker="w", config="", environment={}, **places)


@pytest.mark.parametrize(("restarts", "epoch"), [(None, 1), ("0", 1), ("2", 2)])
def test_an_attempt_that_slurm_has_queued_again_takes_the_lease_anew(tmp_path, monkeypatch, restarts, epoch):
    """The node that was lost may run the earlier attempt still."""
    if restarts is None:
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    else:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    job = Job.model_validate({**FACTS, "id": "a1", "kind": "slurm", "slurm": 7, "epoch": 1})
    lease = Lease(tmp_path / "lock")
    lease.take_for("Slurm job 7", 1, job="a1", stage="pretend")
    begun = _begin_attempt(node_spec(tmp_path, job), tmp_path)
    assert begun.job.epoch == submitted(tmp_path).epoch == lease.record()["epoch"] == epoch
    LeaseFence(lease, "a1", begun.job.epoch).check()
    if epoch > 1:
        with pytest.raises(LeaseLostError):
            LeaseFence(lease, "a1", 1).check()


def test_an_attempt_of_a_job_that_was_replaced_does_not_begin(tmp_path):
    job = Job.model_validate({**FACTS, "id": "a1", "kind": "slurm", "slurm": 7, "epoch": 1})
    take_elsewhere(tmp_path, job="b2")
    with pytest.raises(LeaseLostError, match="on elsewhere; Slurm job 7 ends"):
        _begin_attempt(node_spec(tmp_path, job), tmp_path)
    assert submitted(tmp_path) is None


def test_the_command_says_in_one_line_that_its_job_was_replaced(tmp_path, monkeypatch, capsys):
    def replaced(config, observe):
        raise LeaseLostError("runs/a was taken over by process 5 on elsewhere; this job has ended")

    monkeypatch.setattr(cli, "stage_function", lambda command: replaced)
    file = tmp_path / "a.yaml"
    file.write_text("{}")
    assert cli.main(["train", "--config", str(file)]) == 1
    error = capsys.readouterr().err
    assert error == "fm: runs/a was taken over by process 5 on elsewhere; this job has ended\n"
