"""Causes of failures that no rank could record: no descriptor, a full disk, no memory, a failed launcher."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fm_core.errors import JobFailedError, Outcome, SolverError, StopRequested, UnreachableError, UserError
from fm_core.launch import exit_records
from fm_core.launch.exit_records import ended_at, open_log, read_exit_records, stopped_at, write_exit_record
from fm_core.launch.failure_reasons import failure_of
from fm_core.launch.job import Job
from fm_core.launch.rank_errors import outcome_and_message
from fm_core.storage.atomic_files import write_json
from tests.support import ROOT

AGENT = """Traceback (most recent call last):
  File "run.py", line 1, in <module>
    main()
{error}
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "logs").mkdir()
    facts = {
        "id": "a1",
        "stage": "train",
        "host": "h",
        "pid": 1,
        "created": 0.0,
        "threads": 1,
        "processes": 2,
    }
    return Job.model_validate({**facts, "log": str(tmp_path / "logs" / "train.log")})


def test_a_rank_without_space_for_its_record_prints_it(job: Job, tmp_path: Path, monkeypatch, capsys):
    def full(path: Path, record: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exit_records, "write_json", full)
    write_exit_record(tmp_path, "train", "a1", 1, Outcome.REFUSED, "data.root: a\ncannot be read")
    printed = capsys.readouterr().out
    assert "cannot write the exit record of rank 1 ([Errno 28] No space left on device)" in printed
    (tmp_path / "logs" / "train-1.log").write_text(f"step 1\n{printed}more\n")
    assert read_exit_records(tmp_path, job)[1]["message"] == "data.root: a\ncannot be read"
    verdict = failure_of(job, tmp_path)
    assert (type(verdict), str(verdict)) == (UserError, "data.root: a\ncannot be read")


def test_the_record_of_a_rank_whose_directory_is_not_mounted_is_in_its_log(job: Job, tmp_path: Path, capsys):
    empty = tmp_path / "mount-point"
    empty.mkdir()
    write_exit_record(empty, "train", "a1", 0, Outcome.UNREACHABLE, "cannot write the last checkpoint")
    (tmp_path / "logs" / "train-0.log").write_text(capsys.readouterr().out)
    assert read_exit_records(tmp_path, job)[0]["message"] == "cannot write the last checkpoint"
    write_json(tmp_path / "job.json", job.model_dump())
    write_exit_record(tmp_path, "train", "a1", 0, Outcome.FAILED, "no file")
    assert capsys.readouterr().out == ""


def test_a_record_that_another_job_has_printed_is_ignored(job: Job, tmp_path: Path):
    record = '{"job": "b2", "rank": 0, "kind": "user", "message": "not ours"}'
    (tmp_path / "logs" / "train-0.log").write_text(f"{exit_records.PREFIX}{record}\n")
    assert read_exit_records(tmp_path, job) == {}


EXHAUSTED = """
import os, resource, sys
import fm_core.launch.worker_main as worker
worker._adopted = lambda rank: True
worker.raise_open_file_limit = lambda: 0
from fm_core.errors import UserError
def work(config, rank):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    files = []
    try:
        while True:
            files.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        worker.KEEP = files
        raise RuntimeError(f"no more files: {error}")
worker.run_worker("train", work, sys.argv[1])
"""


def test_a_rank_without_descriptors_leaves_its_record_and_its_log(job: Job, tmp_path: Path):
    config = tmp_path / "train.yaml"
    config.write_text("{}\n")
    variables = {"FM_CONTROL": str(tmp_path), "FM_LOGS": str(tmp_path / "logs"), "FM_JOB": "a1"}
    variables |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EXHAUSTED, str(config)]
    assert subprocess.run(command, env={**os.environ, **variables}, cwd=tmp_path, timeout=60).returncode == 1
    record = read_exit_records(tmp_path, job)[1]
    assert record["kind"] == "error"
    assert record["message"] == "RuntimeError: no more files: [Errno 24] Too many open files: '/dev/null'"
    assert f"rank 1 exits (error): {record['message']}" in (tmp_path / "logs" / "train-1.log").read_text()


def test_a_rank_may_open_as_many_files_as_the_hard_limit_allows(tmp_path: Path):
    code = (
        "import resource, fm_core.launch.worker_main as worker; worker._adopted = lambda rank: True\n"
        "def work(config, rank): print('limit', resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)\n"
        f"worker.run_worker('train', work, {str(tmp_path / 'train.yaml')!r})"
    )
    (tmp_path / "train.yaml").write_text("{}\n")
    variables = {"FM_CONTROL": str(tmp_path), "FM_LOGS": "", "FM_JOB": "a1", "PYTHONPATH": str(ROOT)}
    variables |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 900)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "limit 900" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("AttributeError: 'NoneType' object has no attribute 'poll'", JobFailedError),
        (
            "torch.distributed.elastic.multiprocessing.api.SignalException: Process 1 got signal: 15",
            StopRequested,
        ),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ", StopRequested),
        (None, StopRequested),
    ],
)
def test_ranks_that_a_broken_launcher_stopped_were_not_asked_to(job: Job, tmp_path: Path, error, kind):
    log = tmp_path / "logs" / "train.log"
    log.write_text(AGENT.format(error="KeyError: of an earlier job"))
    open_log(job)
    with log.open("a") as file:
        file.write(AGENT.format(error=error) if error else "")
    for rank in (0, 1):
        write_exit_record(tmp_path, "train", "a1", rank, Outcome.STOPPED, "stopped at step 4")
    verdict = failure_of(job, tmp_path)
    assert type(verdict) is kind
    if kind is JobFailedError:
        assert f"the launcher on h failed ({error}); stopped at step 4" in str(verdict)
        (tmp_path / "STOP").touch()
        assert isinstance(failure_of(job, tmp_path), StopRequested)


def test_a_killed_rank_is_not_blamed_on_memory_without_a_sign(job: Job, tmp_path: Path):
    write_exit_record(tmp_path, "train", "a1", 0, Outcome.FAILED, "connection closed")
    assert "memory" not in str(failure_of(job, tmp_path))
    killed = str(failure_of(job, tmp_path, oom_kills=1))
    assert (
        "rank 1 on h was killed (out of memory: the kernel killed a process of this host meanwhile)" in killed
    )


def test_the_end_of_the_last_rank_that_stopped_is_known(job: Job, tmp_path: Path):
    assert ended_at(tmp_path, job, Outcome.STOPPED) == 0.0
    write_exit_record(tmp_path, "train", "a1", 0, Outcome.STOPPED, "stopped")
    os.utime(tmp_path / "train-0.end.json", (50.0, 50.0))
    assert ended_at(tmp_path, job, Outcome.STOPPED) == 50.0
    assert ended_at(tmp_path, job, Outcome.ORPHANED) == 0.0
    assert stopped_at(tmp_path) == 0.0  # there is no job.json
    write_json(tmp_path / "job.json", job.model_dump())
    assert stopped_at(tmp_path) == 50.0


class OutOfMemoryError(RuntimeError):
    """As torch's class is called."""


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("error", "stage", "key"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "train", "train.micro_batch"),
        (MemoryError(), "sample", "sample.batch"),
        (RuntimeError(ALLOCATOR), "evaluate", "evaluate.likelihood.batch"),
        (
            SolverError("solver dopri5 failed between t = 0 and 1: underflow in dt 0.0"),
            "sample",
            "sample.rtol",
        ),
        (AssertionError("underflow in dt 0.0"), "train", "rtol and atol of method.objective"),
    ],
)
def test_a_failure_that_every_start_would_meet_names_the_key_to_change(error, stage: str, key: str):
    outcome, message = outcome_and_message(error, stage)
    assert outcome is Outcome.UNRECOVERABLE
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("Connection closed by peer"), Outcome.FAILED),
        (OSError(errno.ENOSPC, "No space left on device"), Outcome.FAILED),
        (UnreachableError("s3://bucket"), Outcome.UNREACHABLE),
        (UserError("train.images"), Outcome.REFUSED),
    ],
)
def test_other_failures_are_what_they_were(error, outcome: Outcome):
    assert outcome_and_message(error, "train")[0] is outcome
