"""Hostfiles, node specifications of a job, and exit records of its hosts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from uuid import uuid4

import pytest

from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import UserError
from fm_core.launch.dispatch import submit, world
from fm_core.launch.exit_records import PREFIX, collect_exit_records, open_log
from fm_core.launch.hostfile import read_hostfile
from fm_core.launch.job import JOB_VARIABLE, Job, end_processes, processes_marked
from fm_core.launch.launcher import JobSpec, worker_environment
from fm_core.launch.node_spec import (
    interface_towards,
    node_spec_of,
    portable_environment,
    remove_visibility_marks,
)
from fm_core.storage.atomic_files import read_json, write_json

FACTS = {"id": "00a1", "stage": "train", "host": "h1", "processes": 3, "threads": 1, "log": "x"}


def test_a_hostfile_gives_the_processes_of_each_host_in_its_order(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# two racks\nnode-b slots=4\n\n10.0.0.7   # as many as asked for\nnode-a slots=1\n")
    assert list(read_hostfile(str(file), 8).items()) == [("node-b", 4), ("10.0.0.7", 8), ("node-a", 1)]


@pytest.mark.parametrize(
    "text",
    [
        "node-a slots=8",
        "\ufeffnode-a slots=8",
        "node-a slots=8\r\n",
        "node-a slots = 8",
        "node-a\tslots=8 max_slots=16",
        "node-a slots=8 max-slots=8",
        "node-a max_slots=8",
        "root@node-a slots=8",
        "first.last@node-a  # eight by launch.processes",
    ],
)
def test_other_forms_of_a_line_mean_the_same(tmp_path, text):
    file = tmp_path / "hosts"
    file.write_text(text, encoding="utf-8", newline="")
    assert read_hostfile(str(file), 8) == {"node-a": 8}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "names no host"),
        ("# nothing\n", "names no host"),
        ("a slots=2\na slots=2", "line 2 of .*a appears twice"),
        ("a slots=two", "line 1 of .*'a slots=two'"),
        ("a:8", "line 1 of .*'a:8'; expected a name"),
        ("[::1] slots=8", "line 1"),
        ("a slots=8 max_slots=4", "8 slots of a are more than its max_slots"),
        ("node[1-4] slots=2", "line 1"),
        ("a slots=0", "line 1 of .*a has no slots"),
        ("a", "a has no slots=NUMBER; add it or set launch.processes"),
    ],
)
def test_a_wrong_hostfile_is_refused_by_its_line(tmp_path, text, named):
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError, match=named) as caught:
        read_hostfile(str(file), None)
    assert "\n" not in str(caught.value)


def test_a_hostfile_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"launch.hostfile: .*none cannot be read"):
        read_hostfile(str(tmp_path / "none"), None)


def test_the_world_counts_all_hosts(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("a slots=3\nb slots=1\n")
    launch = {"kind": "ssh", "hostfile": str(file), "threads": 5}
    assert world(RunConfig.model_validate({"launch": launch}).launch) == (4, 5)
    launch = {"kind": "slurm", "processes": 8, "threads": 2, "slurm": {"nodes": 3}}
    assert world(RunConfig.model_validate({"launch": launch}).launch) == (24, 2)


def test_ranks_are_counted_through_the_hosts():
    job = Job.model_validate({**FACTS, "hosts": {"b": 2, "a": 1}})
    assert [job.host_of(rank) for rank in range(3)] == ["b", "b", "a"]


def task_at(path, **sections) -> JobSpec:
    config = RunConfig.model_validate({"run": {"root": str(path), "name": "r"}, **sections})
    job = Job.model_validate({**FACTS, "hosts": {"a": 2, "b": 1}})
    return JobSpec(job, path / "r", path / "r" / "logs", "module", path / "x.yaml", config)


def test_a_place_for_checkpoints_is_marked_for_all_hosts_to_see(tmp_path):
    order = node_spec_of(task_at(tmp_path, train={"checkpoint_root": str(tmp_path / "shared")}), {})
    mark = tmp_path / "shared" / ".00a1.seen"
    assert order.job.marks == {"train.checkpoint_root": str(mark)}
    assert mark.exists()
    remove_visibility_marks(order.job)
    assert list((tmp_path / "shared").iterdir()) == []
    assert node_spec_of(task_at(tmp_path, train={"checkpoint_root": "s3://bucket/x"}), {}).job.marks == {}


@pytest.mark.parametrize("stage", ["sample", "evaluate"])
def test_a_place_for_samples_is_marked_for_those_who_draw_and_those_who_score(tmp_path, stage):
    task = task_at(tmp_path, sample={"root": str(tmp_path / "shared")})
    task = replace(task, job=task.job.model_copy(update={"stage": stage}))
    assert node_spec_of(task, {}).job.marks == {"sample.root": str(tmp_path / "shared" / ".00a1.seen")}


def test_hosts_meet_at_the_port_that_is_asked_for_or_at_one_of_the_job(tmp_path):
    assert node_spec_of(task_at(tmp_path), {}).port == 20_000 + 0xA1
    assert node_spec_of(task_at(tmp_path, launch={"port": 4321}), {}).port == 4321


def test_the_environment_goes_along_without_what_means_this_host(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "ours")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/here")
    bound = {"HOME", "SSH_AUTH_SOCK", "PWD", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"}
    for name in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "of this host")
    environment = portable_environment()
    assert environment["AWS_PROFILE"] == "ours"
    assert not bound & environment.keys()


def test_each_host_divides_its_own_cores_unless_threads_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    for named, here, expected in ((0, 3, "4"), (0, 5, "2"), (0, 99, "1"), (7, 3, "7")):
        job = Job.model_validate({**FACTS, "threads": named})
        assert worker_environment(job, tmp_path, None, here)["OMP_NUM_THREADS"] == expected


class Sbatch:
    """Fake sbatch: accepts every job and records its arguments and environment."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        program = folder / "sbatch"
        program.write_text(f'#!/bin/sh\necho "$@" >{folder}/arguments\nenv >{folder}/env\necho 7\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def submit(self, **launch):
        tree = {"run": {"root": str(self.folder)}, "launch": {"kind": "slurm", "processes": 4, **launch}}
        config = RunConfig.model_validate(tree)
        (self.folder / "train.yaml").write_text(dump_yaml(config))
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        job = submit(self.folder, logs, "train", "module", self.folder / "train.yaml", config.launch)
        arguments = dict(
            argument.split("=", 1)
            for argument in (self.folder / "arguments").read_text().split()
            if "=" in argument
        )
        environment = (self.folder / "env").read_text()
        return job, arguments["--cpus-per-task"], environment


def test_slurm_is_asked_for_the_cores_that_are_named_and_not_for_those_of_this_host(tmp_path, monkeypatch):
    sbatch = Sbatch(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("AWS_PROFILE", "ours")
    with pytest.raises(UserError, match=r"launch.threads: .* cpus-per-task"):
        sbatch.submit()
    job, cores, environment = sbatch.submit(threads=3)
    assert (job.threads, cores) == (3, "12")
    assert "AWS_PROFILE=ours" in environment
    assert "\nCUDA_VISIBLE_DEVICES=" not in environment
    job, cores, _ = sbatch.submit(slurm={"options": {"cpus-per-task": 20}})
    assert (job.threads, cores) == (0, "20")


@pytest.mark.parametrize(
    ("launch", "named"),
    [({"kind": "ssh", "hostfile": "hosts"}, "pdsh"), ({"kind": "slurm", "processes": 1}, "sbatch")],
)
def test_a_program_that_is_not_installed_is_named(tmp_path, monkeypatch, launch, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hosts").write_text("a slots=1\n")
    config = RunConfig.model_validate({"launch": launch})
    (tmp_path / "train.yaml").write_text(dump_yaml(config))
    with pytest.raises(UserError, match=f"{named} (is not installed|was not found) on this host"):
        submit(tmp_path, tmp_path, "train", "module", tmp_path / "train.yaml", config.launch)
    assert not (tmp_path / "job.json").exists()


def test_the_interface_of_an_address():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None


def test_exit_records_of_remote_hosts_are_collected_from_the_log(tmp_path):
    log = tmp_path / "train.log"
    job = Job.model_validate({**FACTS, "log": str(log), "hosts": {"h1": 1, "h2": 1, "h3": 1}})

    def end(host, rank, of):
        record = {"schema": 1, "job": of, "rank": rank, "kind": "error", "message": f"of {of}"}
        return f"{host}: {PREFIX}{json.dumps(record)}\n"

    log.write_text(end("h2", 1, "00a1"))  # before the job began: not its own
    open_log(job)
    with log.open("a") as file:
        file.write("h2: step 3\n" + end("h2", 1, "00a1") + end("h3", 2, "b2") + f"h3: {PREFIX}{{cut")
    write_json(tmp_path / "train-0.end.json", {"job": "00a1", "rank": 0, "kind": "done", "message": ""})
    collect_exit_records(job, tmp_path)
    assert read_json(tmp_path / "train-1.end.json")["message"] == "of 00a1"
    assert sorted(path.name for path in tmp_path.glob("*.end.json")) == [
        "train-0.end.json",
        "train-1.end.json",
    ]


MARK = uuid4().hex
"""Of this process alone: tests beside it look for the processes of their own jobs."""


def marked_process(script, *arguments):
    """A process with a mark in its environment, which has printed a line."""
    marked = {**os.environ, JOB_VARIABLE: MARK}
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, env=marked, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_process_trees_are_killed_after_the_grace_period():
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deaf = f"{ignore}; print('up', flush=True); time.sleep(600)"
    marked_process(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])")
    assert len(processes_marked(MARK)) == 2
    end_processes(MARK, grace=0.5)
    assert processes_marked(MARK) == []


def test_within_the_grace_period_a_terminated_process_exits(tmp_path):
    saved = tmp_path / "saved"
    save = "lambda *_: (time.sleep(0.3), pathlib.Path(sys.argv[1]).touch(), sys.exit(3))"
    script = f"import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, {save}); print(flush=True)"
    process = marked_process(f"{script}; time.sleep(600)", str(saved))
    end_processes(MARK, grace=300)
    assert saved.exists()
    assert process.wait() == 3


@pytest.mark.parametrize(
    ("launch", "named"),
    [
        ({"kind": "ssh"}, "launch.hostfile"),
        ({"kind": "slurm"}, "launch.processes"),
        ({"kind": "mpi"}, "launch.kind"),
        ({"port": 80}, "launch.port"),
        (
            {"kind": "slurm", "processes": 1, "slurm": {"options": {"requeue": ""}}},
            "launch.slurm.options.requeue",
        ),
        ({"kind": "slurm", "processes": 1, "slurm": {"options": {"-p": "x"}}}, "launch.slurm.options.-p"),
        ({"kind": "slurm", "processes": 1, "slurm": {"options": {"time": 86400}}}, "in quotes"),
    ],
)
def test_a_launch_section_that_cannot_be_is_refused_by_key(tmp_path, launch, named):
    from fm_core.config import parse_config

    with pytest.raises(UserError) as caught:
        parse_config({"launch": launch}, where="x.yaml")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
